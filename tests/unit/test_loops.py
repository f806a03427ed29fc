"""Judging loops of users' own: what nobody asked for is not missed, and what was seen is judged as ever."""

from __future__ import annotations

import dataclasses
import math

import pytest

from pytest_sftguard.loops import judged
from pytest_sftguard.records import RunRecord
from pytest_sftguard.registry import NotFoundError
from pytest_sftguard.verdicts import Outcome
from tests.support import canned

LEFT_OUT = {"round_trip": None, "schedule": None, "log": (), "looks": (), "max_grad_norm": None}


def observed(**changes: object) -> RunRecord:
    """A healthy record of a loop: nothing but its steps."""
    return dataclasses.replace(
        canned.healthy(), **{"observed": True, "questions": 0, "answers": (), **LEFT_OUT, **changes}
    )


def test_a_loop_passes_by_its_steps_alone() -> None:
    """Without a file, a schedule, or the log of a Trainer."""
    run = judged(observed())
    assert run.verdict.outcome is Outcome.PASSED, run.verdict.findings


@pytest.mark.parametrize("field", ["round_trip", "schedule"])
def test_a_trainer_needs_what_a_loop_may_leave_out(field: str) -> None:
    """It always could have been seen there."""
    assert not judged(dataclasses.replace(canned.healthy(), **{field: None})).verdict.passed


@pytest.mark.parametrize("field", ["steps", "adapter", "base", "optimizer", "seconds"])
def test_a_loop_needs_what_its_steps_show(field: str) -> None:
    """These are there wherever a loop was observed."""
    empty = () if field in ("steps", "adapter") else None
    assert not judged(observed(**{field: empty})).verdict.passed


def test_a_loop_is_held_to_the_clipping_that_it_names() -> None:
    """And to none where it names none."""
    step = dataclasses.replace(canned.healthy().steps[0], grad_norm=8.0, received_grad_norm=2.0)
    steps = (step, *canned.healthy().steps[1:])
    assert judged(observed(steps=steps)).verdict.of("norm_honest")[0].outcome is not Outcome.FAILED
    held = judged(observed(steps=steps, max_grad_norm=1.0))
    assert held.verdict.of("norm_honest")[0].outcome is Outcome.FAILED


def test_nan_fails_a_loop() -> None:
    """As everywhere."""
    step = dataclasses.replace(canned.healthy().steps[0], micro_losses=(math.nan,), loss=math.nan)
    run = judged(observed(steps=(step, *canned.healthy().steps[1:])))
    assert {"raw_loss_finite"} <= {f.invariant for f in run.verdict.failures}


def test_waived_and_loosened_invariants_are_heeded() -> None:
    """As in the marker."""
    frozen = observed(base=dataclasses.replace(canned.healthy().base, digest_after="other"))
    assert not judged(frozen).verdict.passed
    assert judged(frozen, waive=["base_bit_frozen"]).verdict.passed
    with pytest.raises(NotFoundError, match=r"there is no threshold 'nothing\.at_all'"):
        judged(observed(), thresholds={"nothing.at_all": 1.0})
