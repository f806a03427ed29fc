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
from pytest_sftguard.records import (
    DefectRecord,
    ErrorRecord,
    FirstStepRecord,
    Names,
    ReachRecord,
    RecordError,
    RunRecord,
)
from pytest_sftguard.verdicts import JudgedRun, judge
from tests.strategies import gaps, healthy_records, put, remove
from tests.support.canned import HEAD, A, B, healthy, with_step, with_steps, with_tensor, within

ALL = load_invariants()
NAN = math.nan
SCALED = Cell("fp16-mixed", 2, 1)


def named(record, **references):
    """The mechanisms that are named for `record`, the best first."""
    return [d.mechanism for d in diagnose(JudgedRun(record, judge(record, ALL, references), references))]


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
        with_steps(healthy(Cell("fp16-true", 2, 1)), max_abs_gradient=3e4),
        2,
        grad_norm=math.inf,
        max_abs_gradient=math.inf,
        received_grad_norm=math.inf,
    ),
    "half_precision_trainables": with_tensor(healthy(), A, dtype="float16"),
    "gradient_underflow_in_float16": with_step(
        with_steps(healthy(Cell("fp16-true", 2, 1)), max_abs_gradient=1e-8),
        3,
        grad_norm=NAN,
        max_abs_gradient=NAN,
        received_grad_norm=NAN,
    ),
}


def defective(name, rows=8, **more):
    """A record in whose micro-batches the audit of the labels found `name`."""
    record = healthy()
    defect = DefectRecord(name=name, rows=rows, step=1, example="'a row'", **more)
    return within(record, "supervision", trained_defects=(defect,))


def logged(**changes):
    """A record whose log says `changes` of step 2."""
    record = healthy()
    log = tuple(dataclasses.replace(line, **changes) if line.step == 2 else line for line in record.log)
    return dataclasses.replace(record, log=log)


def clipped(norm, record=None):
    """A record whose optimizer was given gradients of `norm(...)` of those that there were, with max_grad_norm 1."""
    record = record or healthy(max_grad_norm=1.0)
    norms = [0.1, 4.0, 5.0, 6.0]
    steps = tuple(
        dataclasses.replace(s, grad_norm=n, received_grad_norm=norm(n))
        for s, n in zip(record.steps, norms, strict=True)
    )
    return dataclasses.replace(record, steps=steps)


def hidden_by_clipping():
    """A record whose logged norms are not the gradients' at the steps that were clipped."""
    record = clipped(lambda norm: min(norm, 1.0))
    norms = [0.1, 9.0, 9.0, 9.0]
    log = tuple(dataclasses.replace(line, grad_norm=n) for line, n in zip(record.log, norms, strict=True))
    return dataclasses.replace(record, log=log)


def paced(rates):
    """A record of steps at `rates`, with a schedule that falls from 5 to 1."""
    record = within(healthy(steps=5), "schedule", rates=(5.0, 4.0, 3.0, 2.0, 1.0))
    steps = tuple(dataclasses.replace(s, learning_rate=r) for s, r in zip(record.steps, rates, strict=True))
    return dataclasses.replace(record, steps=steps)


def changed_losses():
    """A record in which compute_loss halves each of the model's losses."""
    record = healthy(steps=5)
    steps = tuple(
        dataclasses.replace(s, micro_losses=tuple(loss / 2 for loss in s.model_losses), model_losses=s.model_losses)
        for s in record.steps
    )
    return dataclasses.replace(record, steps=steps, first_step=FirstStepRecord())


WIRING = {
    "adapter_partly_frozen": within(healthy(), "wiring", frozen=Names.of([A])),
    "adapter_not_attached": within(healthy(), "wiring", unmatched=Names.of(["gate"])),
    "base_not_frozen": within(healthy(), "base", trainable=Names.of(["embed"]), changed=Names.of(["embed"])),
    "base_changed": within(healthy(), "base", changed=Names.of(["embed"])),
    "nan_in_base_weights": within(healthy(), "foundation", nonfinite=Names.of(["embed"])),
    "base_not_loaded": within(healthy(), "foundation", not_loaded=Names.of(["head"])),
    "base_not_reproducible": within(healthy(), "round_trip", drawn=Names.of(["embed"]), other_seed=1),
    "both_factors_zero": within(healthy(), "initial", zero_a=Names.of([A])),
    "adapter_scaled_by_zero": within(healthy(), "initial", zero_scaling=Names.of(["q_proj"])),
    "other_adapter_trained": within(healthy(), "base", changed=Names.of(["q_proj.lora_A.second.weight"])),
    "fresh_head_not_saved": within(
        within(healthy(), "foundation", not_loaded=Names.of(["score.weight"])),
        "round_trip",
        drawn=Names.of(["model.score.weight"]),
        other_seed=1,
    ),
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
    "labels_shifted_twice": defective("mismatched", offset=1),
    "labels_misplaced": defective("mismatched", offset=-1),
    "labels_are_not_the_rows_tokens": defective("mismatched"),
    "end_token_not_supervised": defective("endless"),
    "mask_hides_tokens": defective("hidden_tokens"),
    "padding_supervised": defective("padding_supervised"),
    "prompt_supervised": defective("prompt_supervised"),
    "duplicate_bos": defective("doubled_bos", rows=16),
    "rows_changed_on_the_way": within(defective("mismatched"), "supervision", strange_inputs=8),
    "labels_changed_on_the_way": within(defective("doubled_bos"), "supervision", strange_inputs=0, strange_labels=8),
    "defective_rows_in_the_data_set": within(
        defective("truncated", rows=2),
        "supervision",
        dataset_defects=(DefectRecord(name="truncated", rows=2, example="'a row'"),),
    ),
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
    "gradients_altered": with_step(healthy(max_grad_norm=0.0), 3, received_grad_norm=0.25),
    "loss_changed_on_the_way": changed_losses(),
    "factor_gradient_altered": with_step(healthy(), 3, factor_mismatch=0.5),
    "clipping_left_out": clipped(lambda norm: norm),
    "clipped_at_another_norm": clipped(lambda norm: min(norm, 0.125)),
    "clipped_before_unscaling": clipped(lambda norm: 1 / 65536, healthy(SCALED, max_grad_norm=1.0)),
    "logged_norm_altered": dataclasses.replace(logged(grad_norm=9e9), max_grad_norm=0.0),
    "norm_is_not_the_gradients": hidden_by_clipping(),
    "learning_rate_not_finite": with_step(
        healthy(), 3, learning_rate=NAN, changed=0, nonfinite_weights=Names.of([A, B])
    ),
    "elements_never_move": with_tensor(healthy(), A, changed_fraction=0.5),
    "logged_loss_altered": logged(loss=9e9),
    "backward_not_finite": with_step(
        healthy(max_grad_norm=0.0),
        3,
        grad_norm=NAN,
        received_grad_norm=NAN,
        max_abs_gradient=NAN,
        nonfinite_gradients=Names.of([A, B]),
    ),
    "update_not_finite": with_step(healthy(), 3, nonfinite_weights=Names.of([A])),
    "loss_does_not_reach_the_adapter": with_step(
        healthy(), 3, grad_norm=0.0, received_grad_norm=0.0, zero_gradients=Names.of([A, B])
    ),
    "adapted_layer_never_called": dataclasses.replace(
        with_steps(healthy(), zero_gradients=Names.of([A, B]), idle=Names.of([A, B])),
        reach=ReachRecord(layers=2, unreached=Names.of([A.partition(".lora_A")[0]])),
    ),
    "gradient_does_not_reach_a_part": with_step(healthy(), 3, missing_gradients=Names.of([A])),
    "step_leaves_a_part_unmoved": with_step(healthy(), 3, unchanged=Names.of([A]), changed=1),
    "optimizer_leaves_out_steps": with_step(healthy(), 3, unchanged=Names.of([A, B]), changed=0, max_update=0.0),
    "parameter_group_without_rate": with_step(
        within(healthy(), "optimizer", without_rate=Names.of([A])), 3, unchanged=Names.of([A]), changed=1
    ),
    "gradients_below_eps": with_step(
        with_steps(
            within(healthy(), "optimizer", betas=(0.9, 0.999), eps=1e-8), max_abs_gradient=1e-12, max_update_ratio=1e-4
        ),
        3,
        unchanged=Names.of([A]),
        changed=1,
    ),
    "update_is_not_the_optimizers": with_step(
        with_steps(within(healthy(), "optimizer", betas=(0.9, 0.999)), max_update_ratio=1.0), 3, max_update_ratio=17.0
    ),
    "schedule_too_slow": paced([5.0, 5.0, 4.0, 4.0, 3.0]),
    "schedule_does_not_move": paced([5.0] * 5),
    "schedule_too_fast": paced([5.0, 3.0, 1.0, 0.5, 0.25]),
    "rate_set_beside_the_schedule": paced([5.0, 4.0, 7.0, 2.0, 1.0]),
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
    "adapter_file_incomplete": within(healthy(), "round_trip", missing=Names.of([A])),
    "saved_before_training": within(
        healthy(), "round_trip", zero=Names.of([B]), differing=Names.of([A, B]), file_differing=Names.of([A, B])
    ),
    "reload_differs_from_the_file": within(
        healthy(), "round_trip", differing=Names.of([A, B]), file_differing=Names.of([])
    ),
    "trained_adapter_not_saved": healthy(
        round_trip=None, error=ErrorRecord(stage="round_trip", type="AdapterNotSavedError", message="no file")
    ),
    "other_base": within(healthy(), "round_trip", fresh_base_digest="other", other_seed=None),
    "adapter_file_differs": within(healthy(), "round_trip", differing=Names.of([B])),
    "scaling_wrong": within(healthy(), "round_trip", rescaled=Names.of(["q_proj (2, reloaded 4)"])),
    "reloaded_model_computes_otherwise": within(healthy(), "round_trip", max_logit_change=0.5),
    "merging_changes_the_model": within(healthy(), "merge", max_logit_change=90.0),
    "merged_model_not_saved_whole": within(healthy(), "merge", max_saved_change=90.0),
    "disabled_adapter_leaves_something": within(healthy(), "round_trip", max_base_change=0.5),
    "kernel_computes_otherwise": within(
        healthy(), "round_trip", computed_otherwise=Names.of([A]), max_logit_change=0.5, max_logit_effect=90.0
    ),
    "merge_rewrites_tied_embedding": within(healthy(), "merge", touched=Names.of(["embed"])),
}
INFERENCE = {
    "nan_taken_for_a_number": healthy(answers=[NAN, NAN]),
    "forward_not_finite": dataclasses.replace(
        with_step(healthy(), 1, loss=NAN, micro_losses=(NAN,)),
        first_step=dataclasses.replace(healthy().first_step, token_loss=NAN),
    ),
    "loss_not_finite": with_step(healthy(), 1, loss=NAN, micro_losses=(NAN,)),
    "loss_has_no_graph": healthy(
        error=ErrorRecord(
            stage="train",
            type="RuntimeError",
            message="element 0 of tensors does not require grad and does not have a grad_fn",
        )
    ),
}
ELSEWHERE = {
    "prompt_tokens_differ",
    "attention_row_fully_masked",
    "packed_rows_see_each_other",
    "state_runs_on_across_packs",
    "padding_attended",
    "positions_count_padding",
    "batch_built_otherwise",
    "evaluation_rows_all_masked",
    "schedule_runs_at_skipped_steps",
    "merge_swallowed_in_bfloat16",
    "attention_kernel_backward_not_finite",
    "attention_kernel_forward_not_finite",
    "attention_kernels_disagree",
    "training_path_computes_otherwise",
    "checkpointing_drops_gradients",
    "evaluation_is_random",
    "loss_gradient_wrong",
    "rotary_frequencies_in_half_precision",
    "padded_on_the_right",
    "prompts_padded_without_mask",
    "answers_depend_on_their_batch",
    "parser_accepts_junk",
    "parser_raises",
    "retry_keeps_trained_weights",
    "optimizer_stepped_beside_the_loop",
    "accumulation_mean_of_means",
    "library_leaves_loss_undivided",
    "loss_grows_with_micro_batches",
    "loss_divided_twice",
    "gradients_cleared_between_micro_batches",
    "accumulated_gradient_wrong",
    "forward_depends_on_the_batch_split",
    "loss_divided_by_unshifted_labels",
    "replicas_average_means",
    "replicas_train_apart",
    "checkpoint_changes_state",
    "resume_loses_scale",
    "resume_loses_state",
    "resume_sees_other_rows",
    "resume_restores_something_else",
    "rows_come_in_another_order",
    "rows_depend_on_their_batch",
    "learned_something_else",
    "not_repeatable",
}
"""Mechanisms that a look or another run shows: `test_across.py` here has a case of each, or the fault library a
training."""

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
            with_rate(within(healthy(), "optimizer", state_dtypes=("float16",), fused=True), 1e-3), 3, max_update=1.0
        ),
        "forward_overflow_in_float16": with_steps(healthy(SCALED), loss=NAN, micro_losses=(NAN,)),
        "loss_scale_collapse": with_steps(healthy(SCALED, steps=5, skipped={1, 2, 3, 4}), loss_scale_after=0.5),
        "all_labels_masked": with_step(healthy(), 2, supervised_tokens=0),
        "adapter_not_in_optimizer": with_steps(within(healthy(), "optimizer", owns_trainables=False), changed=0),
        "adapter_frozen": healthy(adapter=()),
        "learning_rate_zero": with_steps(healthy(), changed=0, learning_rate=0.0),
        "learning_rate_too_high": with_step(
            with_step(with_step(with_rate(healthy(), 5.0), 1, loss=0.5), 3, loss=50.0), 4, loss=NAN, micro_losses=(NAN,)
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
    if not mechanism.startswith(("log", "norm")):
        record = dataclasses.replace(record, log=())
    if "schedule" not in mechanism:
        record = dataclasses.replace(record, schedule=None)
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


def test_the_schedule_runs_on_at_a_skipped_step():
    """Rates that count skipped steps, under a scaler that skipped more than a healthy one does."""
    record = within(healthy(SCALED, steps=8, skipped=(1, 2, 3, 4, 5)), "schedule", rates=tuple(range(8, 0, -1)))
    steps = tuple(dataclasses.replace(s, learning_rate=9.0 - s.step) for s in record.steps)
    assert "schedule_runs_at_skipped_steps" in named(dataclasses.replace(record, steps=steps))


@pytest.mark.parametrize("rates", [[5.0, 5.0, 5.0, 5.0, 5.0], [5.0, 4.0, 3.0, 2.0, 7.0], [7.0] * 5])
def test_only_a_schedule_at_a_multiple_of_its_pace_is_too_fast(rates):
    """A rate that stays, or that is none of the schedule's, does not come from a schedule stepped too often."""
    assert "schedule_too_fast" not in named(paced(rates))


@pytest.mark.parametrize("mechanism", EVIDENCE)
def test_diagnosis_is_whole(mechanism):
    """What is named says what happens, why that is thought, and what to change."""
    record = dataclasses.replace(
        EVIDENCE[mechanism], log=EVIDENCE[mechanism].log if mechanism.startswith(("log", "norm")) else ()
    )
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


def test_rows_that_lack_more_than_truncation_takes_are_not_truncated():
    """A wrong answer in more rows than had the greatest length has another cause."""
    counts = {"truncated": 4, "wrong_answer": 5}
    defects = tuple(DefectRecord(name=n, rows=r, step=1, example="'a row'") for n, r in counts.items())
    record = within(healthy(), "supervision", trained_defects=defects)
    assert named(record)[0] == "wrong_labels"


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
