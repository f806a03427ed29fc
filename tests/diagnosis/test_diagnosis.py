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
from pytest_sftguard.records import DefectRecord, ErrorRecord, Names, RecordError, RunRecord
from pytest_sftguard.verdicts import JudgedRun, judge
from tests.strategies import gaps, healthy_records, put, remove
from tests.support.canned import HEAD, A, B, healthy, with_step, with_steps, with_tensor, within

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
    "half_trainables_under_a_scaler": healthy(
        SCALED, error=ErrorRecord(stage="train", type="ValueError", message="Attempting to unscale FP16 gradients.")
    ),
    "backward_overflow_in_float16": with_step(
        healthy(Cell("fp16-true", 2, 1)), 2, grad_norm=math.inf, max_abs_gradient=math.inf, received_grad_norm=math.inf
    ),
    "half_precision_trainables": with_tensor(with_step(healthy(), 2, loss=NAN), A, dtype="bfloat16"),
    "gradient_underflow_in_float16": with_step(
        with_steps(healthy(Cell("fp16-true", 2, 1)), max_abs_gradient=1e-8),
        3,
        grad_norm=NAN,
        max_abs_gradient=NAN,
        received_grad_norm=NAN,
    ),
}


def defective(name):
    """A record in whose micro-batches the audit of the labels found `name`."""
    record = healthy()
    defect = DefectRecord(name=name, rows=8, step=1, example="'a row'")
    return within(record, "supervision", trained_defects=(defect,))


def logged(**changes):
    """A record whose log says `changes` of step 2."""
    record = healthy()
    log = tuple(dataclasses.replace(line, **changes) if line.step == 2 else line for line in record.log)
    return dataclasses.replace(record, log=log)


WIRING = {
    "adapter_partly_frozen": within(healthy(), "wiring", frozen=Names.of([A])),
    "adapter_not_attached": within(healthy(), "wiring", unmatched=Names.of(["gate"])),
    "base_not_frozen": within(healthy(), "base", trainable=Names.of(["embed"]), changed=Names.of(["embed"])),
    "base_changed": within(healthy(), "base", changed=Names.of(["embed"])),
    "nan_in_base_weights": within(healthy(), "foundation", nonfinite=Names.of(["embed"])),
    "base_not_loaded": within(healthy(), "foundation", not_loaded=Names.of(["head"])),
    "base_not_reproducible": within(healthy(), "round_trip", drawn=Names.of(["embed"]), other_seed=1),
    "adapter_perturbs_the_base": within(
        healthy(), "initial", nonzero_b=Names.of([B]), loaded=False, changed_logits=9, max_logit_change=0.5
    ),
    "precision_not_applied": healthy(SCALED, loss_scaling=False),
    "trainables_in_the_checkpoints_type": with_tensor(
        healthy(weights_dtypes={"bfloat16": 2}, head=True), HEAD, dtype="bfloat16", initial_dtype="bfloat16"
    ),
}
DATA = {
    "rows_without_labels": defective("unsupervised"),
    "labels_shifted_twice": defective("mismatched"),
    "prompt_supervised": defective("prompt_supervised"),
    "duplicate_bos": defective("doubled_bos"),
    "token_id_out_of_range": defective("unknown_id"),
    "rows_truncated": defective("truncated"),
    "wrong_labels": defective("wrong_answer"),
    "nonfinite_batch": with_step(healthy(), 3, loss=NAN, micro_losses=(NAN,)),
}
COURSE = {
    "no_step_taken": dataclasses.replace(healthy(), steps=(), log=(), global_step=0),
    "nonfinite_gradient_clipped": with_step(
        healthy(),
        3,
        grad_norm=math.inf,
        max_abs_gradient=math.inf,
        nonfinite_gradients=Names.of([B]),
        nonfinite_weights=Names.of([B]),
    ),
    "optimizer_state_poisoned": with_step(healthy(), 3, nonfinite_moments=Names.of([f"{A}:exp_avg"])),
    "nan_in_adapter": with_tensor(healthy(), B, final_norm=NAN),
    "weights_changed_from_outside": with_step(healthy(), 3, max_change_before=1e9),
    "gradients_not_cleared": with_step(healthy(), 3, stale_gradients=Names.of([A])),
    "gradients_altered": logged(grad_norm=9e9),
    "log_laundered": dataclasses.replace(
        with_step(healthy(), 2, micro_losses=(NAN,), loss=NAN, grad_norm=NAN, received_grad_norm=1.0),
        log=logged(loss=0.0).log,
    ),
}
SAVING = {
    "adapter_keys_dropped": within(
        healthy(), "round_trip", unexpected=Names.of(["x"]), missing=Names.of([A]), max_logit_effect=0.0
    ),
    "adapter_file_empty": within(healthy(), "round_trip", tensors=0, missing=Names.of([A, B])),
    "other_base": within(healthy(), "round_trip", fresh_base_digest="other", other_seed=None),
    "adapter_file_differs": within(healthy(), "round_trip", differing=Names.of([B])),
    "scaling_wrong": within(healthy(), "round_trip", max_logit_change=0.5),
    "kernel_computes_otherwise": within(
        healthy(), "round_trip", computed_otherwise=Names.of([A]), max_logit_change=0.5, max_logit_effect=90.0
    ),
    "merge_rewrites_tied_embedding": within(healthy(), "merge", touched=Names.of(["embed"])),
}
INFERENCE = {
    "nan_taken_for_a_number": healthy(answers=[NAN, NAN]),
}
ELSEWHERE = {
    "prompt_tokens_differ",
    "attention_row_fully_masked",
    "packed_rows_see_each_other",
    "evaluation_rows_all_masked",
    "schedule_runs_at_skipped_steps",
    "schedule_too_fast",
    "merge_swallowed_in_bfloat16",
    "attention_kernel_backward_not_finite",
    "loss_gradient_wrong",
    "rotary_frequencies_in_half_precision",
    "padded_on_the_right",
    "parser_accepts_junk",
    "retry_keeps_trained_weights",
    "accumulation_mean_of_means",
    "loss_divided_by_unshifted_labels",
    "replicas_average_means",
    "resume_loses_scale",
    "resume_loses_state",
    "rows_depend_on_their_batch",
    "learned_something_else",
    "not_repeatable",
}
"""Mechanisms that a look or another run shows: the fault library has a training of each, but for the last few, which
name what no other mechanism explains."""

EVIDENCE = (
    NUMBERS
    | WIRING
    | DATA
    | COURSE
    | SAVING
    | INFERENCE
    | {
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
        "learning_rate_too_high": with_step(
            with_step(with_step(healthy(), 1, loss=0.5), 3, loss=50.0), 4, loss=NAN, micro_losses=(NAN,)
        ),
    }
)


def test_every_mechanism_is_tried():
    """The table of evidence here holds every mechanism of the table of mechanisms."""
    names = {m.name for m in MECHANISMS}
    assert set(EVIDENCE) <= names
    assert names - set(EVIDENCE) <= ELSEWHERE


@pytest.mark.parametrize("mechanism", EVIDENCE)
def test_mechanism_is_named_first(mechanism):
    """A mechanism that the record shows is the first that is named."""
    record = EVIDENCE[mechanism]
    # elsewhere the canned log and rates are not the matter
    if mechanism not in ("log_laundered", "gradients_altered"):
        record = dataclasses.replace(record, log=(), schedule=None)
    assert named(record)[0] == mechanism


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
        pytest.param(with_step(healthy(), 2, learning_rate=NAN), "schedule_too_fast", id="nan-rate"),
        pytest.param(with_steps(healthy(), learning_rate=NAN), "schedule_too_fast", id="nan-rates"),
        pytest.param(with_step(healthy(), 2, learning_rate=math.inf), "schedule_too_fast", id="infinite-rate"),
        pytest.param(
            with_step(healthy(SCALED, skipped={1}), 3, learning_rate=NAN),
            "schedule_runs_at_skipped_steps",
            id="nan-late",
        ),
    ],
)
def test_mechanism_is_not_named(record, absent):
    """A mechanism whose conditions the record contradicts is not named."""
    assert absent not in named(record)


@pytest.mark.parametrize(
    ("skipped", "mechanism"), [((), "schedule_too_fast"), ((1,), "schedule_runs_at_skipped_steps")]
)
@pytest.mark.parametrize("place", [4, None], ids=["rate-of-the-last-step", "rate-of-no-step"])
def test_another_rate_is_the_schedules_pace(place, skipped, mechanism):
    """A rate that the schedule has elsewhere, or nowhere, means that it does not keep step."""
    record = healthy(SCALED, steps=5, skipped=skipped, values=(0.5, 1.25, 2.0, 3.5))
    record = within(record, "schedule", rates=(5.0, 4.0, 3.0, 2.0, 1.0))
    record = with_step(with_steps(record, learning_rate=5.0), 3, learning_rate=2.0 if place else 7.0)
    assert mechanism in named(record)


@pytest.mark.parametrize("mechanism", EVIDENCE)
def test_diagnosis_is_whole(mechanism):
    """What is named says what happens, why that is thought, and what to change."""
    record = EVIDENCE[mechanism]
    first = diagnose(JudgedRun(record, judge(record, ALL)))[0]
    assert first.summary and first.cure and all(first.evidence)  # noqa: PT018 - one statement: nothing is empty


def test_more_evidence_goes_first():
    """Of two mechanisms that the record shows, the one with more evidence is named first, wherever it stands."""
    both = with_step(EVIDENCE["adapter_not_in_optimizer"], 4, supervised_tokens=0)
    assert named(both)[:2] == ["adapter_not_in_optimizer", "all_labels_masked"]


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
        value = data.draw(st.sampled_from(["batch_split", "nan", "inf", 0]))
        if value == "batch_split":
            remove(plain, path)
        else:
            put(plain, path, value)
    try:
        damaged = RunRecord.from_dict(plain)
    except RecordError:
        damaged = dataclasses.replace(record, steps=())
    assert len(named(damaged)) <= len(MECHANISMS)
