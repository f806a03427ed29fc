"""An exception of the guard's own, or of a reference run, is never a verdict on the training."""

from __future__ import annotations

import dataclasses

import pytest

from pytest_sftguard.diagnosis import diagnose
from pytest_sftguard.invariants import load_invariants
from pytest_sftguard.matrix import Cell
from pytest_sftguard.records import ErrorRecord, LookRecord
from pytest_sftguard.tiers import LOOKS, REFERENCES
from pytest_sftguard.verdicts import JudgedRun, Outcome, judge
from tests.support.canned import healthy, within

ALL = load_invariants()
FILLED = {
    "wiring": ("wiring", "initial", "foundation"),
    "supervision": ("supervision",),
    "prompts": ("prompts",),
    "replay": ("replay",),
    "context": ("context",),
    "paths": ("paths",),
    "evaluation": ("evaluation",),
    "base_answers": ("base_answers",),
    "decoding": ("decoding",),
    "batches": ("batches",),
    "arrival": ("arrival",),
    "base_during": ("base_during",),
    "reach": ("reach",),
    "checkpoints": ("checkpoint",),
    "continuing": ("following",),
    "following": ("following",),
    "large_checkpoints": ("checkpoint",),
    "first_batch": ("derivative", "footprint", "aim", "future"),
    "randomness": ("randomness",),
    "answering": ("answering",),
    "kept_checkpoint": ("kept",),
    "merging": ("merge",),
}
"""Fields of a record that each look fills."""
BROKEN = {
    name: healthy(looks=(LookRecord(name=name, error="KeyError: 'input_ids'"),), **dict.fromkeys(fields))
    for name, fields in FILLED.items()
} | {"round_trip": within(healthy(), "round_trip", not_asked="KeyError: 'input_ids'")}
ERROR = ErrorRecord(stage="train", type="OutOfMemoryError", message="out of memory")


def test_every_look_is_tried():
    """Each look of the engine is broken in turn."""
    assert set(FILLED) == set(LOOKS)


@pytest.mark.parametrize("name", BROKEN)
def test_broken_look_is_no_failure(name):
    """A look that raised leaves the cell passed, and says so under the look's name."""
    verdict = judge(BROKEN[name], ALL)
    broken = [f for f in verdict.findings if f.guards_own]
    assert verdict.passed
    assert {f.evidence["name"] for f in broken} == {name}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_look_is_not_enough_for_strict(name):
    """Under --sftguard-strict the cell is not evaluated, and no cause is read out of the exception."""
    judged = JudgedRun(BROKEN[name], judge(BROKEN[name], ALL, strict=True))
    assert judged.verdict.outcome is Outcome.NOT_EVALUATED
    assert diagnose(judged) == []


@pytest.mark.parametrize("name", REFERENCES)
def test_broken_reference_is_no_failure(name):
    """A reference run that ended in an exception leaves the healthy cell passed, unless the session is strict."""
    record = healthy(Cell("bf16-mixed", 4, 2))
    references = {name: dataclasses.replace(record, error=ERROR, variant=name)}
    assert judge(record, ALL, references).passed
    assert judge(record, ALL, references, strict=True).outcome is Outcome.NOT_EVALUATED
