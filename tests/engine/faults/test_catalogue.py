"""The fault catalogue: what a fault declares exists, and each fault is caught in a training of the built-in target."""

from __future__ import annotations

from collections import Counter

import pytest

from pytest_sftguard import detection, registry, tiers
from pytest_sftguard.diagnosis import MECHANISMS
from pytest_sftguard.engine.faults import Fault, fault_named, load_faults
from pytest_sftguard.invariants import load_invariants
from pytest_sftguard.verdicts import invariant_name

SUMS = "pytest_sftguard.engine.models.sums:build_trainer"
ELSEWHERE = {
    "fully-masked-attention-row": {"raw_loss_finite"},
    "fused-loss-wrong-gradient": {"answers_beat_base"},
    "lr-too-high-collapse": {"one_batch_overfit"},
    "right-padded-generation": {"answers_beat_base"},
    "rope-low-precision": {"precision_agreement"},
}
"""Invariants that report a fault on other targets, in higher tiers or with other versions of the libraries alone."""

each_fault = pytest.mark.parametrize("fault", load_faults(), ids=lambda fault: fault.id)


def test_ids_are_unique() -> None:
    """No two faults have the same name."""
    assert [i for i, count in Counter(fault.id for fault in load_faults()).items() if count > 1] == []


@each_fault
def test_what_a_fault_declares_exists(fault: type[Fault]) -> None:
    """Its invariants, its mechanism and its looks are known here, and a control has none of the first two."""
    assert set(fault.reported_by) <= {invariant_name(i) for i in load_invariants()}
    assert fault.mechanism in {m.name for m in MECHANISMS} if fault.reported_by else fault.mechanism == ""
    assert set(fault.looks) <= {*tiers.LOOKS, *tiers.REFERENCES}


@each_fault
def test_a_fault_is_described(fault: type[Fault]) -> None:
    """It says what it injects, and where to read of it."""
    assert fault.injects.strip()
    assert fault.source.startswith("https://")


@each_fault
def test_a_fault_is_found_by_its_name(fault: type[Fault]) -> None:
    """Both by its id and with underscores, as in a module's name."""
    assert type(fault_named(fault.id)) is type(fault_named(fault.id.replace("-", "_"))) is fault


def test_an_unknown_fault_lists_the_others() -> None:
    """The message quotes the name, and has every id."""
    with pytest.raises(registry.NotFoundError, match=r"unknown fault 'no_such': choose from accum.*, zero-sharded-"):
        fault_named("no_such")


@each_fault
def test_a_fault_is_caught(fault: type[Fault]) -> None:
    """Each of its invariants reports it, at its step and with its tensor; its mechanism is first; a control passes."""
    seen = detection.attempt(fault.id, SUMS)
    assert not seen.skipped
    if seen.is_control:
        assert seen.reported == ()
        return
    assert seen.caught
    assert set(seen.expected) - ELSEWHERE.get(fault.id, set()) <= set(seen.reported)
    assert seen.late in (0, None)
    assert seen.located in (True, None)
    assert seen.explained
