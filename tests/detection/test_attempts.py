"""Detection: what counts as caught, located, explained and as a false alarm, and how the rates are told."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from pytest_sftguard.detection import Attempt, Detection, beside, reports
from pytest_sftguard.detection.tables import markdown, row, text
from pytest_sftguard.invariants import load_invariants
from pytest_sftguard.verdicts import JudgedRun, judge
from tests.support import canned

CAUGHT = Attempt(
    fault="one",
    cell="fp32-b4x1",
    precision="fp32",
    expected=("raw_loss_finite", "gradients_finite"),
    reported=("gradients_finite", "stops"),
    step=3,
    seen_at=4,
    tensor="lora_A",
    pointed=True,
    mechanism="overflow",
    named=("overflow", "other"),
    silent=True,
    seconds=2.0,
)
CONTROL = Attempt(fault="healthy", precision="fp32")


@pytest.mark.parametrize(
    ("changes", "caught", "located", "explained"),
    [
        ({}, True, True, True),
        ({"reported": ("stops",)}, False, True, True),
        ({"reported": ()}, False, True, True),
        ({"seen_at": 3}, True, True, True),
        ({"seen_at": 5}, True, False, True),
        ({"seen_at": 2}, True, False, True),
        ({"seen_at": None}, True, False, True),
        ({"pointed": False}, True, False, True),
        ({"tensor": "", "pointed": False}, True, True, True),
        ({"step": None, "tensor": ""}, True, None, True),
        ({"named": ("other", "overflow")}, True, True, False),
        ({"named": ()}, True, True, False),
        ({"mechanism": ""}, True, True, None),
    ],
)
def test_what_counts(changes: dict[str, object], caught: bool, located: bool | None, explained: bool | None) -> None:
    """Caught by an invariant that must report it, located within a step, explained where the cause comes first."""
    attempt = replace(CAUGHT, **changes)
    assert (attempt.caught, attempt.located, attempt.explained) == (caught, located, explained)


def test_a_control_is_no_fault() -> None:
    """A healthy training of which nothing is reported is green, and of which something is, a false alarm."""
    alarm = replace(CONTROL, reported=("stops",))
    assert not CONTROL.false_alarm
    assert alarm.false_alarm
    assert Detection("t", (CONTROL, CAUGHT)).sound
    assert not Detection("t", (alarm, CAUGHT)).sound


def test_nothing_tried_is_not_sound() -> None:
    """A library of which nothing could be tried says nothing of the guard."""
    assert not Detection("t", ()).sound
    assert not Detection("t", (replace(CAUGHT, skipped="no questions"),)).sound


def test_what_stands_without_the_fault_catches_nothing() -> None:
    """What is reported of the target as it is, in the same precision, does not count."""
    plain = [replace(CONTROL, reported=("gradients_finite",)), replace(CONTROL, precision="bf16-true")]
    (same,) = beside([CAUGHT], plain)
    (other,) = beside([replace(CAUGHT, precision="bf16-true")], plain)
    assert not same.caught
    assert other.caught


def test_rates() -> None:
    """The summary counts what was caught, located, explained and cried for nothing."""
    missed = replace(CAUGHT, reported=(), seen_at=None, named=(), silent=False)
    rates = "\n".join(Detection("t", (CAUGHT, missed, CONTROL, replace(CAUGHT, skipped="no"))).summary())
    assert "detection      1 of 2 (50.0%)" in rates
    assert "silent ones    1 of 1 (100.0%)" in rates
    assert "localisation   1 of 2" in rates
    assert "mechanism      1 of 2" in rates
    assert "false alarms   0 of 1" in rates
    assert "not tried      1: one" in rates


def test_table_and_file() -> None:
    """Every attempt has a row, and is written as plain JSON."""
    found = Detection("t", (CAUGHT, CONTROL, replace(CAUGHT, skipped="no questions")))
    table = list(markdown(found))
    assert sum(line.startswith("| one |") for line in table) == 2
    assert row(CAUGHT)[2:5] == ("caught", "gradients_finite", "4")
    assert json.loads(json.dumps(found.to_dict()))["attempts"][0]["late"] == 1


def test_what_went_wrong_is_told() -> None:
    """The terminal shows what a missed fault injects, which invariants were expected, and what was reported instead."""
    missed = replace(CAUGHT, reported=("stops",), injects="writes NaN", message="stops: no end")
    lines = list(text(Detection("t", (missed,))))
    wording = ["one: writes NaN", "    expected raw_loss_finite, gradients_finite", "    reported stops: stops: no end"]
    assert lines[3:6] == wording


def test_what_had_to_be_evaluated_is_reported_too() -> None:
    """A precision that did not happen is a report, and what a higher tier would look at is none."""
    record = canned.healthy(compute_dtypes={"float16": 2})
    run = JudgedRun(record, judge(record, load_invariants()))
    assert [f.invariant for f in reports(run)] == ["precision_is_real"]
