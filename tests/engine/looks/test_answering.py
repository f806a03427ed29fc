"""The target's own `generate`: what is not the adapter's answer is seen, and every sound method passes in silence."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pytest_sftguard.rendering import message
from pytest_sftguard.verdicts import JudgedRun, Outcome
from tests.targets import answering as methods

Run = Callable[..., JudgedRun]


def findings(run_cell: Run, method: str, precision: str = "fp32", **config: object) -> list[tuple[Outcome, str]]:
    """What the invariant says where `generate` of the target is `method`."""
    with methods.answered(getattr(methods, method)) as target:
        run = run_cell(target, precision, looks=("answering",), **({"steps": 4} | config))
    return [(f.outcome, message(f)) for f in run.verdict.of("answers_from_adapter")]


@pytest.mark.parametrize(
    ("method", "text"),
    [
        ("without_the_adapter", "answers with the base"),
        ("unloading", "left another model than it was given"),
        ("sampling", "samples: "),
        ("in_training_mode", "dropout was active"),
        ("left_in_training_mode", "left the model in training mode"),
        ("truncated", "only a part of 4 of 4 prompts"),
        ("without_mask", "are not the adapter's own"),
    ],
)
def test_what_is_not_the_adapters_answer_fails(run_cell: Run, method: str, text: str) -> None:
    """Each fault has its reason."""
    found = findings(run_cell, method, steps=20)
    assert any(outcome is Outcome.FAILED and text in told for outcome, told in found), found


@pytest.mark.parametrize("steps", [1, 4])
def test_a_base_that_the_adapter_hardly_changed_is_told_from_it(run_cell: Run, steps: int) -> None:
    """After a step or four the base's scores are near the adapter's, and are still not its own."""
    found = findings(run_cell, "without_the_adapter", steps=steps, training_arguments={"learning_rate": 1e-3})
    assert "answers with the base" in found[0][1]


@pytest.mark.parametrize("precision", ["fp32", "bf16-true"])
@pytest.mark.parametrize("method", ["padded_left", "with_beams", "with_penalty", "one_by_one", "by_hand", "merged"])
def test_a_sound_method_passes(run_cell: Run, method: str, precision: str) -> None:
    """Beams, a penalty, single prompts, a loop by hand and a merged copy answer with the adapter."""
    assert {outcome for outcome, _ in findings(run_cell, method, precision)} == {Outcome.PASSED}


def test_the_guards_own_generation_needs_no_look(run_cell: Run) -> None:
    """A target without `generate` is answered by the guard, so that there is nothing to compare."""
    run = run_cell("pytest_sftguard.engine.models.sums:build_trainer", looks=("answering",), steps=2)
    [finding] = run.verdict.of("answers_from_adapter")
    assert (finding.outcome, finding.required) == (Outcome.NOT_EVALUATED, False)
