"""Each invariant: silent on a healthy record, failing for what it is there for, and honest where it saw nothing."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_sftguard import registry
from pytest_sftguard.invariants import load_invariants
from pytest_sftguard.matrix import Cell
from pytest_sftguard.records import AnswerRecord, ErrorRecord, Names
from pytest_sftguard.rendering import message
from pytest_sftguard.verdicts import Finding, Outcome
from tests.strategies import healthy_records, non_finite
from tests.support import canned
from tests.support.canned import HEAD, A, B, healthy, lost, with_step, with_steps, with_tensor, within
from tests.support.cases import ends, first_batch, gathered

BUILT_IN = {i.name: i for i in load_invariants()}
SCALED = Cell("fp16-mixed", 2, 1)
NAN = math.nan


def findings(name, record, reference=None, **thresholds):
    """What the invariant `name` says of `record` beside `reference`, with `thresholds` set."""
    return list(dataclasses.replace(BUILT_IN[name], **thresholds).check(record, reference))


def failures(name, record, reference=None, **thresholds):
    """The messages of its findings that failed."""
    return [message(f) for f in findings(name, record, reference, **thresholds) if f.outcome is Outcome.FAILED]


@pytest.mark.parametrize("name", BUILT_IN)
@given(record=healthy_records())
def test_healthy_record_passes(name, record):
    """An invariant finds nothing wrong with a healthy record, and nothing missing that it needs."""
    assert [f for f in findings(name, record) if f.outcome is Outcome.FAILED or f.required] == []


@pytest.mark.parametrize("name", BUILT_IN)
def test_invariant_has_a_code(name):
    """Every invariant stands in the catalogue of failures, under a code of its own."""
    assert [i.code for i in BUILT_IN.values()].count(BUILT_IN[name].code) == 1


def steps_of(record, **changes):
    """`record` without any step, as far as counting goes."""
    return dataclasses.replace(record, steps=(), log=(), max_steps=0, global_step=0, **changes)


def swallowed(**changes):
    """A loss scaler's run of 24 steps, without a skipped one."""
    return healthy(SCALED, steps=24, **changes)


def answered(*texts):
    """A record with an answer for each of `texts`, None of them parsed."""
    answers = tuple(AnswerRecord(prompt="1 km in m", text=t, expected=1000.0) for t in texts)
    return dataclasses.replace(healthy(), answers=answers, questions=len(answers))


def logged(**changes):
    """A healthy record whose log says `changes` of step 2."""
    record = healthy()
    log = tuple(dataclasses.replace(line, **changes) if line.step == 2 else line for line in record.log)
    return dataclasses.replace(record, log=log)


FAILURES = {
    "raw_loss_finite": {
        "nan-loss": (
            with_step(healthy(), 2, micro_losses=(NAN,), loss=NAN),
            "not finite at 1 of 4 .*step 2, micro-batch 1",
        ),
        "inf-loss": (with_steps(healthy(), micro_losses=(math.inf,)), "not finite at 4 of 4 steps .first: step 1"),
        "one-micro-batch": (
            with_step(healthy(Cell("fp32", 2, 3)), 3, micro_losses=(1.0, NAN, 1.0)),
            "step 3, micro-batch 2",
        ),
        "sum-alone": (with_step(healthy(), 2, loss=-math.inf), "first: step 2\\)"),
        "sum-not-seen": (with_step(healthy(), 2, loss=None), "first: step 2\\)"),
        "log-says-0": (
            dataclasses.replace(with_step(healthy(), 2, micro_losses=(NAN,)), log=logged(loss=0.0).log),
            "the Trainer's log shows 0 there",
        ),
    },
    "gradients_finite": {
        "nan": (with_step(healthy(), 3, grad_norm=NAN), "grad_norm is not finite at 1 of 4 steps .first: step 3"),
        "inf": (with_steps(healthy(), grad_norm=math.inf), "at 4 of 4 steps"),
        "tensor": (with_step(healthy(), 2, nonfinite_gradients=Names.of([B])), f"step 2 in {B}"),
        "not-seen": (with_step(healthy(), 2, grad_norm=None), "grad_norm was not seen"),
        "applied-under-a-scaler": (with_step(healthy(SCALED), 2, grad_norm=math.inf), "grad_norm is not finite"),
    },
    "weights_and_moments_finite": {
        "weights": (
            with_step(healthy(), 2, nonfinite_weights=Names.of([A])),
            "1 trainable tensor held NaN .* after step 2",
        ),
        "moments": (
            with_step(healthy(), 2, nonfinite_moments=Names.of([f"{A}:exp_avg"])),
            "1 optimizer state held NaN .* step 2",
        ),
        "after-a-skipped-step": (
            with_step(healthy(SCALED, skipped={1}), 1, nonfinite_moments=Names.of([f"{A}:exp_avg"])),
            "after step 1",
        ),
        "at-the-end": (with_tensor(healthy(), B, final_norm=math.inf), "1 of 2 trainable tensors .* at the end"),
        "end-not-seen": (with_tensor(healthy(), B, final_norm=None), "1 of 2 trainable tensors"),
        "in-the-file": (within(healthy(), "round_trip", nonfinite=Names.of([A])), "in the saved file"),
        "device-lost": (with_step(lost(), 2, nonfinite_weights=Names.of([A])), "1 trainable tensor .* after step 2"),
    },
    "every_factor_moves": {
        "lora_B": (with_tensor(healthy(), B, delta_norm=0.0), "1 of 2 tensors"),
        "lora_A": (with_tensor(healthy(), A, delta_norm=0.0), "1 of 2 tensors"),
        "other-tensor": (
            with_tensor(healthy(head=True), HEAD, delta_norm=0.0),
            "no finite change other than zero of .*lm_head",
        ),
        "delta-nan": (with_tensor(healthy(), B, delta_norm=NAN), "no finite change"),
        "delta-not-seen": (with_tensor(healthy(), B, delta_norm=None), "no finite change"),
        "few-elements": (with_tensor(healthy(), A, changed_fraction=0.25), "25.0% of the elements"),
        "elements-nan": (with_tensor(healthy(), A, changed_fraction=NAN), "nan% of the elements"),
        "elements-not-seen": (with_tensor(healthy(), A, changed_fraction=None), "nan% of the elements"),
        "still-at-a-step": (with_step(healthy(), 3, changed=1, unchanged=Names.of([A])), "did not change at step 3"),
        "lora_B-at-the-first-step": (
            with_step(healthy(), 1, changed=1, unchanged=Names.of([B])),
            "lora_B.* did not change at step 1",
        ),
        "no-zero-start": (with_tensor(healthy(), B, initial_norm=1.0), "lora_A.* did not change at step 1"),
        "no-adapter": (healthy(adapter=()), "no trainable tensor"),
        "no-effective-step": (with_steps(healthy(), changed=0), "no step left a changed, finite adapter"),
    },
    "effective_steps": {
        "no-effect": (with_step(healthy(), 3, changed=0), "1 of 4 steps changed no parameter .first: step 3"),
        "idle-twice": (with_step(healthy(idle=True), 2, changed=0, learning_rate=0.0), "first: step 2"),
        "idle-late": (with_step(healthy(), 4, changed=0, learning_rate=0.0), "first: step 4"),
        "no-effect-at-first": (with_step(healthy(), 1, changed=0), "first: step 1"),
        "not-seen": (with_step(healthy(), 2, changed=None), "what step 2 did was not seen"),
        "skipped-early": (healthy(SCALED, steps=6, skipped={1, 2, 3, 4}), "skipped 4 of the first 6 steps"),
        "skipped-to-the-tenth": (swallowed(skipped={1, 2, 3, 10}), "skipped 4 of the first 10 steps"),
        "skipped-from-the-eleventh": (swallowed(skipped={11, 12}), "skipped 2 of the ten steps from step 11"),
        "skipped-late": (swallowed(skipped={12, 21}), "skipped 2 of the ten steps from step 12"),
        "skipped-all": (healthy(SCALED, steps=2, skipped={1, 2}), "skipped every step"),
        "scale-collapsed": (with_step(healthy(SCALED), 2, loss_scale_after=0.5), "loss scale is 0.5 at step 2"),
        "scale-nan": (with_step(healthy(SCALED), 2, loss_scale=NAN), "loss scale is nan at step 2"),
        "scale-inf": (with_step(healthy(SCALED), 2, loss_scale_after=math.inf), "loss scale is inf"),
        "no-labels": (with_step(healthy(), 2, supervised_tokens=0), "1 of 4 steps had no supervised token .*step 2"),
        "undone": (with_step(healthy(), 3, max_change_before=1e9), "something other than .* 1e\\+09 after step 2"),
        "stale": (with_step(healthy(), 3, stale_gradients=Names.of([A])), f"1 of 4 steps began .*step 3, {A}"),
    },
    "base_bit_frozen": {
        "digest": (within(healthy(), "base", digest_after="other"), "digest of the 12 base tensors changed"),
        "named": (within(healthy(), "base", changed=Names.of(["embed"])), "1 of 12 base tensors changed .*: embed"),
        "rearranged": (
            within(healthy(), "base", rearranged=Names.of(["layers.0"])),
            "rearrange the weights of 1 4-bit layer .* since: layers.0; set",
        ),
        "trainable": (
            within(healthy(), "base", trainable=Names.of(["embed"])),
            "1 tensor of the base, which no .*: embed",
        ),
    },
    "round_trip": {
        "empty": (within(healthy(), "round_trip", tensors=0), "the adapter file is empty"),
        "missing": (
            within(healthy(), "round_trip", missing=Names.of([A])),
            f"the adapter file lacks 1 tensor, or .*: {A}",
        ),
        "unexpected": (
            within(healthy(), "round_trip", unexpected=Names.of(["x"])),
            "1 tensor that the adapter does not have: x",
        ),
        "nonfinite": (within(healthy(), "round_trip", nonfinite=Names.of([A])), f"1 tensor with NaN or infinity: {A}"),
        "zero": (within(healthy(), "round_trip", zero=Names.of([B])), f"1 tensor of zeros alone, .*: {B}"),
        "differing": (
            within(healthy(), "round_trip", differing=Names.of([B])),
            f"reloading changed the bits of 1 tensor: {B}",
        ),
        "rescaled": (
            within(healthy(), "round_trip", rescaled=Names.of(["q (2, reloaded 1)"])),
            "changed the scaling of 1 layer: q .2, reloaded 1",
        ),
        "warned": (within(healthy(), "round_trip", load_warnings=("missing keys",)), "loading warned: missing keys"),
        "other-base": (within(healthy(), "round_trip", fresh_base_digest="other"), "builds another base each time"),
        "logits-differ": (within(healthy(), "round_trip", max_logit_change=0.1), "differ from the trained model's"),
        "logits-nan": (within(healthy(), "round_trip", max_logit_change=NAN), "differ from the trained model's by nan"),
        "largest-logit-inf": (within(healthy(), "round_trip", max_abs_logit=math.inf), "differ from the trained"),
        "no-effect": (within(healthy(), "round_trip", max_logit_effect=0.0), "changes no logit"),
        "effect-nan": (within(healthy(), "round_trip", max_logit_effect=NAN), "changes no logit"),
    },
    "strict_answers": {
        "none-parsed": (answered("km", "lots"), "0 of 2 answers could be read as a number .*was answered 'km'"),
        "nan-parsed": (healthy(answers=[NAN, NAN, 1.0]), "1 of 3 answers"),
        "inf-parsed": (healthy(answers=[math.inf]), "0 of 1 answer could be read as a number"),
    },
    "norm_honest": {
        "other-norm": (logged(grad_norm=9.0), "logged grad_norm 9 at step 2"),
        "zero": (logged(grad_norm=0.0), "logged grad_norm 0 at step 2"),
        "nan": (logged(grad_norm=NAN), "logged grad_norm nan at step 2"),
        "hides-nan": (with_step(healthy(), 2, grad_norm=NAN), "gradients' norm was nan"),
        "hides-inf": (with_step(healthy(), 2, grad_norm=math.inf), "gradients' norm was inf"),
        "given-others": (with_step(healthy(), 2, received_grad_norm=9.0), "given gradients of norm 9 at step 2"),
        "given-nan": (with_step(healthy(), 2, received_grad_norm=NAN), "given gradients of norm nan at step 2"),
        "not-clipped": (healthy(max_grad_norm=1e-3), "max_grad_norm is 0.001"),
        "clipped-without-a-threshold": (
            with_step(healthy(max_grad_norm=None), 2, grad_norm=5.0, received_grad_norm=1.0),
            "norm was 5 and max_grad_norm is None",
        ),
        "hides-what-was-not-seen": (with_step(healthy(), 2, grad_norm=None), "gradients' norm was nan"),
    },
    "evidence_complete": {
        "error-in-training": (
            healthy(
                error=ErrorRecord(stage="train", type="RuntimeError", message="out of memory", where="a.py:1 in f")
            ),
            r"ended in train: RuntimeError: out of memory \(a.py:1 in f\)",
        ),
        "error-in-answers": (
            healthy(error=ErrorRecord(stage="answers", type="ValueError", message="no")),
            "ended in answers: ValueError: no$",
        ),
        "too-few-steps": (healthy(max_steps=8), "4 of 8 optimizer steps took place"),
        "too-many-steps": (healthy(max_steps=2), "4 of 2 optimizer steps took place"),
        "trainer-counted-more": (healthy(global_step=5), "the Trainer counted 5 optimizer steps, and took 4"),
        "trainer-did-not-count": (healthy(global_step=None), "the Trainer's count of its optimizer steps was not"),
        "numbered-twice": (with_step(healthy(), 3, step=2), "not numbered 1, 2, 3"),
        "no-micro-loss": (
            with_step(healthy(), 2, micro_losses=()),
            "step 2 lacks micro_losses: it has 0 of 1 micro-batch loss$",
        ),
        "too-many-micro-losses": (with_step(healthy(), 2, micro_losses=(1.0, 1.0)), "it has 2 of 1 micro"),
        "first-step-short": (
            with_step(healthy(Cell("fp32", 2, 4)), 1, micro_losses=(1.0,)),
            "step 1 lacks micro_losses: it has 1 of 4 micro-batch losses",
        ),
        "every-step-short": (with_steps(healthy(Cell("fp32", 2, 4)), micro_losses=(1.0,)), "it has 1 of 4"),
        "no-loss-scale": (with_step(healthy(SCALED), 2, loss_scale_after=None), "step 2 lacks loss_scale"),
        "no-adapter": (healthy(adapter=()), "the record lacks adapter"),
        "one-tensor-less": (healthy(adapter=healthy().adapter[:1]), "saw 2 trainable tensors, and the record holds 1"),
        "initial-norm-not-seen": (with_tensor(healthy(), B, initial_norm=None), f"{B} lacks initial_norm"),
        "no-optimizer": (healthy(optimizer=None), "the record lacks optimizer"),
        "no-base": (healthy(base=None), "the record lacks base"),
        "no-round-trip": (healthy(round_trip=None), "the record lacks round_trip"),
        "no-answers": (healthy(questions=8), "the record lacks answers: it has 0 of 8 answers"),
        "one-answer-less": (healthy(answers=[1.0], questions=2), "the record lacks answers: it has 1 of 2 answers"),
        "update-nan": (with_step(healthy(), 2, max_update=NAN), "max_update of step 2 is nan"),
        "answer-inf": (healthy(answers=[1.0, 2.0, math.inf]), r"answers\[2\].parsed is inf"),
        "logged-norm-nan": (logged(grad_norm=NAN), "grad_norm of step 2 in the Trainer's log is nan"),
        **{
            f"{name}-not-seen": (with_step(healthy(), 2, **{name: None}), f"step 2 lacks {name}")
            for name in ("loss", "grad_norm", "max_abs_gradient", "learning_rate", "changed", "max_update", "seconds")
        },
    },
}


FAILURES = gathered("FAILURES", FAILURES)


@pytest.mark.parametrize(
    ("name", "case"),
    [pytest.param(n, case, id=f"{n}-{i}") for n, cases in FAILURES.items() for i, case in cases.items()],
)
def test_invariant_fails(name, case):
    """An invariant fails for each of the things that it is there for, and says what it saw."""
    record, wording, *reference = case
    messages = failures(name, record, *reference)
    assert any(re.search(wording, message) for message in messages), messages


GPU = canned.H100
NOT_EVALUATED = {
    "raw_loss_finite": {
        "no-step": (steps_of(healthy()), "no micro-batch loss was seen"),
        "no-loss": (with_steps(healthy(), micro_losses=()), "no micro-batch loss was seen"),
    },
    "gradients_finite": {
        "no-step": (steps_of(healthy()), "no gradient was seen"),
        "no-norm": (with_steps(healthy(), grad_norm=None), "no gradient was seen"),
    },
    "weights_and_moments_finite": {
        "no-step": (steps_of(healthy()), "no trainable tensor was seen"),
        "no-adapter": (healthy(adapter=()), "no trainable tensor was seen"),
        "device-lost": (lost(), "were out of reach afterwards"),
    },
    "every_factor_moves": {
        "no-step": (steps_of(healthy()), "no optimizer step was seen"),
        "device-lost": (lost(), "were out of reach afterwards"),
    },
    "effective_steps": {
        "no-step": (steps_of(healthy()), "no optimizer step was seen"),
        "no-effect": (with_steps(healthy(), changed=None), "no optimizer step was seen"),
    },
    "base_bit_frozen": {
        "no-base": (healthy(base=None), "no base tensor was digested"),
        "no-tensors": (within(healthy(), "base", tensors=0), "no base tensor was digested"),
        "no-digest": (within(healthy(), "base", digest_before="", digest_after=""), "no base tensor was digested"),
    },
    "round_trip": {
        "not-saved": (healthy(round_trip=None), "not saved and reloaded"),
        "no-digest": (within(healthy(), "round_trip", fresh_base_digest=""), "the fresh base was not digested"),
        "no-base": (healthy(base=None), "the fresh base was not digested"),
        "no-largest-logit": (within(healthy(), "round_trip", max_abs_logit=None), "no logits were compared"),
        "no-change": (within(healthy(), "round_trip", max_logit_change=None), "no logits were compared"),
        "no-effect": (within(healthy(), "round_trip", max_logit_effect=None), "no logits were compared"),
    },
    "norm_honest": {
        "not-given": (with_step(healthy(), 2, received_grad_norm=None), "the optimizer was given at step 2 was not"),
    },
    "strict_answers": {"not-answered": (healthy(questions=2), "no answer was generated")},
    "precision_is_real": {
        "unknown-mode": (healthy(precision="fp8"), "the precision 'fp8' is not known"),
        "no-product": (healthy(compute_dtypes={}), "no matrix product of an adapted layer was seen"),
        "fp16-in-float32": (
            healthy(SCALED, compute_dtypes={"float32": 14}),
            "14 of 14 adapted layers computed in float32, not in float16",
        ),
        "one-layer-in-float32": (
            healthy(SCALED, compute_dtypes={"float16": 13, "float32": 1}),
            "1 of 14 adapted layers computed in float32, not in float16",
        ),
        "other-weights": (healthy(weights_dtypes={"bfloat16": 2}), "the base's weights are bfloat16, not float32"),
        "not-quantised": (
            healthy(Cell("nf4-bf16", 2, 1), weights_dtypes={"bfloat16": 2}),
            "the base's weights are bfloat16, not quantised; in this mode a target with",
        ),
        "no-scaler": (healthy(SCALED, loss_scaling=False), "no loss scaler was at work"),
        "no-autocast": (healthy(Cell("bf16-mixed", 2, 1), autocast_dtype=None), "autocast was off"),
        "other-autocast": (healthy(Cell("bf16-mixed", 2, 1), autocast_dtype="float16"), "autocast was float16"),
        "autocast-in-true": (healthy(Cell("bf16-true", 2, 1), autocast_dtype="bfloat16"), "autocast was bfloat16"),
        "tf32-off": (healthy(Cell("tf32", 2, 1), tf32=False), "tf32 did not happen: tf32 was off"),
        "tf32-in-fp32": (healthy(device=GPU, tf32=True), "fp32 did not happen: tf32 was on"),
        "tf32-not-seen": (healthy(Cell("tf32", 2, 1), tf32=None), "was not seen"),
        "tf32-not-seen-in-fp32": (healthy(device=GPU, tf32=None), "was not seen"),
        "tf32-on-a-cpu": (healthy(Cell("tf32", 2, 1), device=canned.CPU, tf32=None), "was not seen"),
    },
}


NOT_EVALUATED = gathered("NOT_EVALUATED", NOT_EVALUATED)


@pytest.mark.parametrize(
    ("name", "case"),
    [pytest.param(n, case, id=f"{n}-{i}") for n, cases in NOT_EVALUATED.items() for i, case in cases.items()],
)
def test_invariant_is_not_evaluated(name, case):
    """An invariant that saw nothing to decide by says so, in a way that keeps the cell from passing."""
    record, wording, *reference = case
    found = findings(name, record, *reference)
    said_so = [message(f) for f in found if f.outcome is Outcome.NOT_EVALUATED and f.required]
    assert any(wording in message for message in said_so), found


@pytest.mark.parametrize(
    ("name", "case"),
    [(n, case) for table in (FAILURES, NOT_EVALUATED) for n, cases in table.items() for case in cases.values()],
)
def test_every_sentence_finds_its_evidence(name, case):
    """A finding has all the evidence that its sentence names, in the process of another test, too."""
    record, _, *reference = case
    for finding in findings(name, record, *reference):
        again = Finding.from_dict(json.loads(json.dumps(finding.to_dict())))
        assert message(again) == message(finding)
        assert "{" not in message(finding), finding


MAY_BE_MISSING = {
    "eval_and_decode_finite-no-labels": (
        "eval_and_decode_finite",
        within(healthy(), "evaluation", without_loss=2),
    ),
    "strict_answers-no-questions": ("strict_answers", healthy()),
    "norm_honest-no-log": ("norm_honest", healthy(log=False)),
    "norm_honest-skipped-alone": ("norm_honest", healthy(SCALED, steps=1, skipped={1})),
    "log_honest-no-log": ("log_honest", healthy(log=False)),
    "update_upper_bound-no-adam": ("update_upper_bound", within(healthy(), "optimizer", betas=())),
    "update_lower_bound-no-look": ("update_lower_bound", healthy(looks=(), replay=None)),
    "lr_trace-unknown": ("lr_trace", within(healthy(), "schedule", unknown="follows a metric")),
    "identity_at_init-no-factors": ("identity_at_init", within(healthy(), "initial", init="")),
    "identity_at_init-uncompared": ("identity_at_init", within(healthy(), "initial", logits=None, uncompared="so")),
    "answers_from_adapter-no-forward-pass": (
        "answers_from_adapter",
        within(healthy(), "answering", compared=0, max_change=None),
    ),
    "kept_checkpoint-nan": ("kept_checkpoint_is_best", within(healthy(), "kept", values=(NAN,) * 3, losses=())),
    "kept_checkpoint-unknown-metric": ("kept_checkpoint_is_best", within(healthy(), "kept", metric="eval_own")),
    "kept_checkpoint-nothing-to-compare": ("kept_checkpoint_is_best", within(healthy(), "kept", compared=0)),
    "evaluation_is_still-no-loss": ("evaluation_is_still", within(healthy(), "evaluation", repeat_change=None)),
    "targets_reached-no-adapter": ("targets_reached", within(healthy(), "wiring", without_adapter=True)),
    "precision_agreement-quantised": ("precision_agreement", healthy(Cell("nf4-bf16", 2, 1))),
    "prompt_is_prefix-nothing-shared": ("prompt_is_prefix", within(healthy(), "prompts", matched=0)),
}


MAY_BE_MISSING |= first_batch.MAY_BE_MISSING | ends.MAY_BE_MISSING


@pytest.mark.parametrize(("name", "record"), MAY_BE_MISSING.values(), ids=MAY_BE_MISSING)
def test_invariant_may_be_missing(name, record):
    """What a target need not offer is not evaluated, and does not keep the cell from passing."""
    assert [(f.outcome, f.required) for f in findings(name, record)] == [(Outcome.NOT_EVALUATED, False)]


def test_every_invariant_is_tried():
    """Every invariant of the folder has its failures, or its reasons not to be evaluated, in the tables here."""
    assert set(registry.names("pytest_sftguard.invariants")) <= set(FAILURES) | set(NOT_EVALUATED)


@given(record=healthy_records(), value=non_finite(), data=st.data())
def test_skipped_step_may_have_any_gradient(record, value, data):
    """Under dynamic loss scaling the gradients of a skipped step are not finite, and that is healthy."""
    skipped = [s.step for s in record.steps if s.effect == "skipped_by_scaler"]
    for step in skipped:
        record = with_step(record, step, grad_norm=value, max_abs_gradient=value)
    assert failures("gradients_finite", record) + failures("evidence_complete", record) == []


def test_skipped_warm_up_step_waits_for_its_turn():
    """A linear warm-up starts at learning rate 0, and its first step may come after skipped ones."""
    assert failures("effective_steps", healthy(SCALED, steps=6, skipped={1, 2}, idle=True)) == []


def test_growth_probes_may_overflow_now_and_then():
    """Two skipped steps ten steps apart are within what the scaler may do."""
    assert failures("effective_steps", swallowed(skipped={11, 21})) == []


def test_limit_itself_is_allowed():
    """A share of changed elements that is exactly the least that is asked for passes."""
    assert failures("every_factor_moves", with_tensor(healthy(), A, changed_fraction=0.9)) == []


def test_nan_in_the_file_is_told_once():
    """Where the file holds NaN, what follows from that is not told beside it."""
    record = within(healthy(), "round_trip", nonfinite=Names.of([A]), max_logit_change=NAN, max_logit_effect=NAN)
    assert len(failures("round_trip", record)) == 1


def test_last_step_of_an_epoch_may_be_short():
    """An epoch that the accumulation does not divide ends in a step with fewer micro-batches."""
    assert failures("evidence_complete", with_step(healthy(Cell("fp32", 2, 4)), 3, micro_losses=(1.0,))) == []


def test_frozen_bias_is_no_factor():
    """A trainable tensor that is no factor may stand still for a step."""
    record = with_step(healthy(head=True), 3, changed=2, unchanged=Names.of([HEAD]))
    assert failures("every_factor_moves", record) == []


def test_first_failing_step_is_named():
    """A finding carries the first step at which it was seen."""
    record = with_step(with_step(healthy(), 2, micro_losses=(NAN,)), 4, micro_losses=(NAN,))
    assert [f.step for f in findings("raw_loss_finite", record)] == [2]


WORSE = st.integers(0, 10)
THRESHOLDS = {
    ("effective_steps", "max_skipped_early"): (swallowed(skipped={1, 2, 3, 4, 5}), 0, 1),
    ("effective_steps", "max_skipped_late"): (swallowed(skipped={12, 14, 16}), 0, 1),
    ("effective_steps", "max_idle_warm_up"): (
        with_step(healthy(idle=True), 2, changed=0, unchanged=Names.of([A, B]), learning_rate=0.0),
        0,
        1,
    ),
    ("effective_steps", "min_loss_scale"): (with_step(healthy(SCALED), 4, loss_scale_after=5.0), 10.0, -1.0),
    ("effective_steps", "max_undone"): (
        with_step(with_step(healthy(), 2, max_update=1.0), 3, max_change_before=0.5),
        0.0,
        0.1,
    ),
    ("every_factor_moves", "min_changed_fraction"): (with_tensor(healthy(), A, changed_fraction=0.5), 1.0, -0.1),
    ("round_trip", "logits_rtol"): (within(healthy(), "round_trip", max_abs_logit=1.0, max_logit_change=0.5), 0.0, 0.1),
    ("strict_answers", "min_parsed_fraction"): (healthy(answers=[1.0, None]), 1.0, -0.1),
    ("round_trip", "recomputed_rtol"): (
        within(healthy(), "round_trip", max_abs_logit=1.0, max_logit_change=0.5, computed_otherwise=Names.of([A])),
        0.0,
        0.1,
    ),
    ("round_trip", "restored_rtol"): (
        within(healthy(), "round_trip", max_abs_logit=1.0, max_logit_change=0.5, restored=True),
        0.0,
        0.1,
    ),
    ("round_trip", "restored_factor"): (
        within(
            healthy(Cell("bf16-true", 2, 1)),
            "round_trip",
            max_abs_logit=1.0,
            max_logit_effect=0.5,
            max_logit_change=0.05,
            restored=True,
        ),
        0.0,
        0.5,
    ),
    ("norm_honest", "rtol"): (logged(grad_norm=healthy().log[1].grad_norm * 1.5), 0.0, 0.1),
    ("norm_honest", "half_rtol"): (
        with_tensor(logged(grad_norm=healthy().log[1].grad_norm * 1.5), A, dtype="bfloat16"),
        0.0,
        0.1,
    ),
}


THRESHOLDS |= gathered("THRESHOLDS")


def test_every_threshold_is_tried():
    """Every field of every invariant is a threshold in the table here."""
    assert {(n, f.name) for n, i in BUILT_IN.items() for f in dataclasses.fields(i)} == set(THRESHOLDS)


@pytest.mark.parametrize(("name", "field"), THRESHOLDS, ids="-".join)
def test_threshold_decides(name, field):
    """A record on the edge fails under the tightest threshold, and passes under the loosest."""
    record, tightest, step, *reference = THRESHOLDS[name, field]
    outcomes = [bool(failures(name, record, *reference, **{field: tightest + step * i})) for i in (0, 10)]
    assert outcomes == [True, False]


@pytest.mark.parametrize(("name", "field"), THRESHOLDS, ids="-".join)
@given(tighter=WORSE, looser=WORSE)
def test_loosening_never_fails_what_passed(name, field, tighter, looser):
    """What passes under a threshold passes under every looser one."""
    record, tightest, step, *reference = THRESHOLDS[name, field]
    tight, loose = sorted((tighter, looser))
    before = failures(name, record, *reference, **{field: tightest + step * tight})
    after = failures(name, record, *reference, **{field: tightest + step * loose})
    assert before or not after
