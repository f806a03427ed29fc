"""Diagnosis: a mechanism is named where the record has evidence for it, and only there."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_sftguard.diagnosis import MECHANISMS, diagnose
from pytest_sftguard.invariants import load_invariants
from pytest_sftguard.matrix import Cell
from pytest_sftguard.records import ErrorRecord, Names, RecordError, RunRecord
from pytest_sftguard.verdicts import JudgedRun, judge
from tests.canned import A, B, healthy, with_step, with_steps, with_tensor, within
from tests.strategies import gaps, healthy_records, put, remove

ALL = load_invariants()
NAN = math.nan
SCALED = Cell("fp16-mixed", 2, 1)


def named(record):
    """The mechanisms that are named for `record`, the most probable first."""
    return [d.mechanism for d in diagnose(JudgedRun(record, judge(record, ALL)))]


def founding_bug(**optimizer):
    """Adapters in float16, and lora_A is NaN after the first step, where its gradient was 0."""
    record = with_tensor(with_tensor(healthy(Cell("fp16-true", 2, 1)), A, dtype="float16"), B, dtype="float16")
    record = within(record, "optimizer", state_dtypes=("float16",), **optimizer)
    record = with_step(record, 1, nonfinite_weights=Names.of([A]), zero_gradients=Names.of([A]), changed=1)
    for step in (2, 3, 4):
        record = with_step(
            record, step, loss=NAN, micro_losses=(NAN,), grad_norm=NAN, changed=0, nonfinite_weights=Names.of([A, B])
        )
    return record


def with_rate(record, rate):
    return with_steps(record, learning_rate=rate)


NUMBERS = {
    "updates_swallowed_in_bfloat16": with_tensor(healthy(), A, dtype="bfloat16", changed_fraction=0.2),
    "scaler_refuses_float16_trainables": healthy(
        SCALED, error=ErrorRecord(stage="train", type="ValueError", message="Attempting to unscale FP16 gradients.")
    ),
    "backward_overflow_in_float16": with_step(
        healthy(Cell("fp16-true", 2, 1)), 2, grad_norm=math.inf, max_abs_gradient=math.inf
    ),
    "half_precision_trainables": with_tensor(with_step(healthy(), 2, loss=NAN), A, dtype="bfloat16"),
    "gradient_underflow_in_float16": with_step(
        with_steps(healthy(Cell("fp16-true", 2, 1)), max_abs_gradient=1e-8), 3, grad_norm=NAN, max_abs_gradient=NAN
    ),
}

EVIDENCE = NUMBERS | {
    "eps_underflow_in_float16": founding_bug(),
    "moments_underflow_in_float16": with_step(
        with_rate(within(healthy(), "optimizer", state_dtypes=("float16",)), 1e-3), 3, max_update=1.0, loss=NAN
    ),
    "forward_overflow_in_float16": with_step(healthy(SCALED), 2, loss=NAN, micro_losses=(NAN,)),
    "loss_scale_collapse": healthy(SCALED, steps=5, skipped={1, 2, 3, 4}),
    "all_labels_masked": with_step(healthy(), 2, supervised_tokens=0),
    "adapter_not_in_optimizer": with_steps(within(healthy(), "optimizer", owns_trainables=False), changed=0),
    "adapter_frozen": healthy(adapter=()),
    "learning_rate_zero": with_steps(healthy(), changed=0, learning_rate=0.0),
    "learning_rate_too_high": with_step(with_step(healthy(), 1, loss=0.5), 3, loss=50.0, grad_norm=math.inf),
}


def test_every_mechanism_is_tried():
    """The table of evidence here holds every mechanism of the table of mechanisms."""
    assert set(EVIDENCE) == {m.name for m in MECHANISMS}


@pytest.mark.parametrize("mechanism", EVIDENCE)
def test_mechanism_is_named_first(mechanism):
    """A mechanism that the record shows is the first that is named."""
    assert named(EVIDENCE[mechanism])[0] == mechanism


@given(record=healthy_records())
def test_healthy_record_has_no_diagnosis(record):
    """Where nothing failed, no mechanism is named."""
    assert named(record) == []


def test_error_alone_names_nothing():
    """A failure without evidence for any mechanism gets no diagnosis, rather than a guess."""
    assert named(healthy(round_trip=None)) == []


@pytest.mark.parametrize(
    ("record", "absent"),
    [
        pytest.param(founding_bug(eps=1e-4), "eps_underflow_in_float16", id="eps-is-large"),
        pytest.param(founding_bug(eps=None), "eps_underflow_in_float16", id="no-eps"),
        pytest.param(
            with_tensor(with_tensor(founding_bug(), A, dtype="float32"), B, dtype="float32"),
            "eps_underflow_in_float16",
            id="float32-adapter",
        ),
        pytest.param(
            with_step(healthy(SCALED), 2, loss=NAN, micro_losses=(NAN,), supervised_tokens=0),
            "forward_overflow_in_float16",
            id="no-labels",
        ),
        pytest.param(founding_bug(), "forward_overflow_in_float16", id="weights-were-lost-before"),
        pytest.param(
            with_step(healthy(), 2, loss=NAN, micro_losses=(NAN,)), "forward_overflow_in_float16", id="float32-overflow"
        ),
        pytest.param(with_step(healthy(SCALED, skipped={1, 2}), 4, loss=NAN), "loss_scale_collapse", id="two-skipped"),
        pytest.param(with_step(healthy(idle=True), 3, loss=NAN), "learning_rate_zero", id="one-idle-step"),
    ],
)
def test_mechanism_is_not_named(record, absent):
    """A mechanism whose conditions the record contradicts is not named."""
    assert absent not in named(record)


@pytest.mark.parametrize("mechanism", EVIDENCE)
def test_diagnosis_is_whole(mechanism):
    """What is named says what happens, why that is thought, and what to change."""
    record = EVIDENCE[mechanism]
    first = diagnose(JudgedRun(record, judge(record, ALL)))[0]
    assert first.summary and first.cure and all(first.evidence)  # noqa: PT018 - one statement: nothing is empty


def test_more_evidence_goes_first():
    """Of two mechanisms that the record shows, the one with more evidence is named first, wherever it stands."""
    both = with_step(EVIDENCE["adapter_not_in_optimizer"], 4, supervised_tokens=0)
    assert named(both)[:2] == ["all_labels_masked", "adapter_not_in_optimizer"]


def test_evidence_against_weighs():
    """A fused optimizer, which computes in float32, is held against the underflow of eps."""
    record = founding_bug(fused=True)
    against = diagnose(JudgedRun(record, judge(record, ALL)))[0].against
    assert any("fused" in a for a in against)


@given(record=healthy_records(), data=st.data())
def test_any_damage_can_be_diagnosed(record, data):
    """Diagnosis takes whatever a record may hold or lack, and raises nothing."""
    plain = copy.deepcopy(record.to_dict())
    for _ in range(3):
        path = data.draw(st.sampled_from(gaps(plain)))
        value = data.draw(st.sampled_from(["cut", "nan", "inf", 0]))
        if value == "cut":
            remove(plain, path)
        else:
            put(plain, path, value)
    try:
        damaged = RunRecord.from_dict(plain)
    except RecordError:
        damaged = dataclasses.replace(record, steps=())
    assert len(named(damaged)) <= len(MECHANISMS)
