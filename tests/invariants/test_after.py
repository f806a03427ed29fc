"""What the losses claim, and what the invariants that judge by it leave alone."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_sftguard.invariants import load_invariants
from pytest_sftguard.records import Learning
from pytest_sftguard.rendering import message
from pytest_sftguard.verdicts import Outcome
from tests.support.canned import with_step
from tests.support.cases.after import MAY_BE_MISSING, SOUND, learned

BUILT_IN = {i.name: i for i in load_invariants()}


@pytest.mark.parametrize(("name", "record"), SOUND.values(), ids=SOUND)
def test_sound_record_is_left_alone(name, record):
    """An invariant has nothing to say against a sound record."""
    assert list(BUILT_IN[name].check(record)) == []


@pytest.mark.parametrize(("name", "record", "wording"), MAY_BE_MISSING.values(), ids=MAY_BE_MISSING)
def test_training_that_claims_nothing_holds_up_no_cell(name, record, wording):
    """A run that is too short, or has not learned yet, is not evaluated, and is not required to be."""
    (finding,) = BUILT_IN[name].check(record)
    assert (finding.outcome, finding.required) == (Outcome.NOT_EVALUATED, False)
    assert wording in message(finding)


@given(losses=st.lists(st.floats(1e-6, 10), min_size=4, max_size=4))
def test_promise_is_markovs(losses):
    """The share that the losses promise is no more than the share of answers that must be right."""
    record = learned(True, losses=(4.0,) * 12 + tuple(losses))
    learning = Learning.of(record)
    # were each loss that of one row
    certain = sum(x * learning.tokens < math.log(2) for x in losses) / 4
    assert learning.promised <= certain + 1e-9


@pytest.mark.parametrize("gap", ["loss", "supervised_tokens"])
def test_loss_that_was_not_seen_claims_nothing(gap):
    """A gap in the losses or in the tokens leaves nothing to claim by."""
    assert Learning.of(with_step(learned(True), 3, **{gap: None})) is None


def test_loss_in_other_units_claims_nothing():
    """Losses that are small from the first step on say nothing of learning."""
    learning = Learning.of(learned(True, losses=(0.011, *[0.01] * 15)))
    assert not learning.claimed(0.2, 0.25)


def test_long_answers_claim_nothing():
    """Answers that are longer than what is generated cannot be right, and are not held to it."""
    record = learned(True, losses=(4.0, *[1e-6] * 15))
    long = dataclasses.replace(record, steps=tuple(dataclasses.replace(s, supervised_tokens=400) for s in record.steps))
    assert not Learning.of(long).claimed(0.2, 0.25)
