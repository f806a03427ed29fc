"""What the guard's own code raises beside a training: never a verdict on it, and no end of a loop of the user's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pytest_sftguard.diagnosis import diagnose
from pytest_sftguard.engine.adapter import redrawing, round_trip
from pytest_sftguard.engine.after import finiteness
from pytest_sftguard.engine.recording import factors, first_step, layers, recorder, watching
from pytest_sftguard.engine.recording.recorder import Recorder
from pytest_sftguard.loops import judged
from pytest_sftguard.rendering import message
from pytest_sftguard.verdicts import JudgedRun, Outcome
from tests.targets import loops

BESIDE = {
    "collated": (recorder.Collated, "add"),
    "begin": (Recorder, "look_for_stale_gradients"),
    "micro_batch": (recorder, "mean"),
    "gradients": (Recorder, "_dense_gradients"),
    "factors": (factors.Factors, "products"),
    "optimizer": (recorder.stepping, "repeatable"),
    "step": (recorder, "Numbers"),
    "hooks": (layers, "_arithmetic"),
    "logits": (first_step, "logits_of"),
    "offsets": (watching, "only_offset"),
    "fields": (Recorder, "adapter_digest"),
    "file": (round_trip, "_rescaled"),
    "other-seed": (redrawing, "base_digests"),
    "probe": (finiteness, "_left_padded"),
}
"""A function of the guard's own in each stage of a run."""


def fail(*args: Any, **kwargs: Any) -> None:
    """What any of them does when it is broken."""
    raise RuntimeError("a mistake in the guard")


@pytest.fixture(params=BESIDE)
def broken(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them raises."""
    monkeypatch.setattr(*BESIDE[request.param], fail)


@pytest.mark.usefixtures("broken")
def test_it_is_no_failure_of_the_training(run_cell: Callable[..., JudgedRun]) -> None:
    """The cell is not evaluated, says whose mistake it is, and names no cause."""
    run = run_cell(steps=2)
    assert run.verdict.outcome is Outcome.NOT_EVALUATED, run.verdict.failures
    [own] = [f for f in run.verdict.not_evaluated if f.guards_own]
    assert message(own).startswith("the guard's own code ended in RuntimeError: a mistake in the guard")
    assert diagnose(run) == []


def test_what_the_training_raises_is_its_own(run_cell: Callable[..., JudgedRun]) -> None:
    """As where its loss is no tensor."""
    run = run_cell("loss_is_a_number", steps=2)
    assert run.verdict.outcome is Outcome.FAILED
    assert "transformers" in run.record.error.where or "accelerate" in run.record.error.where, run.record.error
    assert not [f for f in run.verdict.findings if f.guards_own]


@pytest.mark.parametrize("name", ["collated", "micro_batch", "gradients", "factors", "optimizer", "step", "hooks"])
@pytest.mark.parametrize("loop", [loops.bare, loops.plain_accelerate])
def test_a_loop_of_the_users_own_goes_on(loop: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The observation ends, the loop does not, and the record says why."""
    steps: list[int] = []
    monkeypatch.setattr(*BESIDE[name], fail)
    run = judged(loop(loops.model(), steps=3, spoil=lambda model, step: steps.append(step)).record())
    assert len(steps) == 3
    assert run.verdict.outcome is Outcome.NOT_EVALUATED, run.verdict.failures
    assert run.record.error is not None
    assert run.record.error.guards_own
