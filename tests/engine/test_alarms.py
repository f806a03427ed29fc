"""Adapters of every method and trainings of unusual sorts pass, and the faults beside them do not."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import ModuleType

import pytest

from pytest_sftguard.rendering import message
from pytest_sftguard.tiers import TIERS
from pytest_sftguard.verdicts import JudgedRun, Outcome
from tests.targets import adapters, unusual

STANDARD = TIERS["standard"].looks
LEAKING = ("leaking_packs", "packs_that_see_each_other")
"""Sequences of a pack see each other, or have positions that run on where positions are learned."""
BY_CHOICE = ("rate_changed",)
"""A rate that a callback sets beside the schedule fails by choice, see `LrTrace`."""
CELLS = [("fp32", name) for name in vars(adapters)] + [("bf16-mixed", "p_tuning"), ("bf16-true", "p_tuning")]


def _targets(module: ModuleType) -> list[str]:
    found = vars(module).items()
    own = [n for n, f in found if inspect.isfunction(f) and f.__module__ == module.__name__]
    return [n for n in own if n[0] != "_" and n != "built"]


def _alarms(run: JudgedRun) -> list[str]:
    """Invariants that failed, and exceptions of the guard's own."""
    return [f"{f.invariant}: {message(f)}" for f in run.verdict.findings if f.outcome is Outcome.FAILED or f.guards_own]


@pytest.mark.slow
# peft warns of layers that two of its methods leave out, and of a kernel that does not compile
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize(("precision", "name"), [c for c in CELLS if c[1] in _targets(adapters)])
def test_every_method_of_peft_passes(run_cell: Callable[..., JudgedRun], precision: str, name: str) -> None:
    """With the looks of `standard`, none of which ends in an exception."""
    run = run_cell(f"tests.targets.adapters:{name}", precision, looks=STANDARD, questions=0)
    assert _alarms(run) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in _targets(unusual) if n not in (*LEAKING, *BY_CHOICE)])
def test_an_unusual_training_passes(run_cell: Callable[..., JudgedRun], name: str) -> None:
    """With the looks of `standard`, none of which ends in an exception."""
    run = run_cell(f"tests.targets.unusual:{name}", looks=STANDARD, questions=0)
    assert _alarms(run) == []


@pytest.mark.parametrize("name", LEAKING)
def test_packs_under_square_masks_are_compared(run_cell: Callable[..., JudgedRun], name: str) -> None:
    """A mask that lets sequences see each other fails, and so do learned positions that run on."""
    run = run_cell(f"tests.targets.unusual:{name}", looks=("context",), questions=0)
    assert "context_independence" in {f.invariant for f in run.verdict.failures}


def test_a_row_is_not_compared_with_itself(run_cell: Callable[..., JudgedRun]) -> None:
    """One whole row under a square mask leaves nothing to take out of its batch."""
    run = run_cell("tests.targets.unusual:one_square_row", batch=(1, 1), looks=("context",), questions=0)
    assert run.record.context is None or all(c.setting != "as trained on" for c in run.record.context.comparisons)


def test_plain_kernels_are_not_compared_with_themselves(run_cell: Callable[..., JudgedRun]) -> None:
    """Eager attention and a loss of one's own have no plain path beside them."""
    run = run_cell("tests.targets.unusual:eager_auxiliary", looks=("paths",), questions=0)
    assert run.record.paths is None
    assert [f.outcome for f in run.verdict.of("path_equivalence")] == [Outcome.NOT_EVALUATED]


def test_a_prompt_behind_which_rows_are_padded_is_not_compared(run_cell: Callable[..., JudgedRun]) -> None:
    """Peft puts it in front of the padding, so that its distance to a row is that of the batch."""
    run = run_cell("tests.targets.unusual:prompt_before_padding", looks=("context",), questions=0)
    assert run.record.context is not None
    assert "between a learned prompt and their tokens" in run.record.context.left_out
    assert not run.record.context.comparisons


def test_an_end_by_request_is_no_failure(run_cell: Callable[..., JudgedRun]) -> None:
    """Early stopping leaves fewer steps, which the record says."""
    record = run_cell("tests.targets.unusual:stopped_early", questions=0).record
    assert record.stopped
    assert len(record.steps) < record.max_steps
