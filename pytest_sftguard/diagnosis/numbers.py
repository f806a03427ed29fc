"""Causes in the number formats: what half precision cannot hold, and what then becomes of loss, gradient and update."""

from __future__ import annotations

import math

from pytest_sftguard.diagnosis.case import Case, Clue, against, decisive, hint, sign
from pytest_sftguard.diagnosis.mechanism import Mechanism
from pytest_sftguard.invariants import base_finite, fp32_master, update_lower_bound
from pytest_sftguard.records import StepRecord, TensorRecord

_FLOAT16_SMALLEST = 2.0**-24
_FLOAT16_LARGEST = 65504.0
_FOLLOWS_FROM_HALF_STATES = {"fp32_master", "update_lower_bound", "every_factor_moves", "precision_agreement"}
"""Invariants that fail where half-precision trainables round their updates away, and not for another reason as well."""


def _eps_underflow(case: Case) -> list[Clue]:
    optimizer, poisoned = case.record.optimizer, case.first(lambda s: bool(s.nonfinite_weights))
    if optimizer is None or optimizer.eps is None or poisoned is None or not case.trainables_are("float16"):
        return []
    if not optimizer.eps < _FLOAT16_SMALLEST:
        return []
    clues = [
        hint(f"the trainable tensors are float16, and {optimizer.name} computes in their type"),
        hint(f"its eps {optimizer.eps:g} is below the smallest float16, 6e-8, and rounds to 0"),
    ]
    zero = set(poisoned.zero_gradients.first)
    struck = [n for n in poisoned.nonfinite_weights.first if n in zero]
    if struck:
        clues.append(
            decisive(
                f"{len(struck)} tensors became NaN at step {poisoned.step}, where their gradient was exactly 0"
                f" (first: {struck[0]}): their update was 0 / (sqrt(0) + 0)"
            )
        )
    else:
        clues.append(against(f"no tensor that became NaN at step {poisoned.step} had a zero gradient there"))
    if poisoned.gradients_finite and (case.lost is None or case.lost.step > poisoned.step):
        clues.append(sign(f"loss and gradients of step {poisoned.step} were still finite: the optimizer made the NaN"))
    else:
        clues.append(against(f"loss or gradients were already not finite at step {poisoned.step}"))
    if optimizer.fused:
        clues.append(against("the optimizer is fused and computes in float32, though it stores float16"))
    return clues


def _half_moments(case: Case) -> list[Clue]:
    optimizer = case.record.optimizer
    if optimizer is None or "float16" not in optimizer.state_dtypes:
        return []
    clues = [hint(f"the optimizer keeps its moments in {', '.join(optimizer.state_dtypes)}")]
    jumps = [s for s in case.record.steps if s.max_update and s.learning_rate and s.max_update > 10 * s.learning_rate]
    if not jumps:
        return []
    ratio = (jumps[0].max_update or 0.0) / (jumps[0].learning_rate or 1.0)
    step = jumps[0].step
    clues.append(sign(f"an element moved by {ratio:.3g} learning rates at step {step}; Adam moves about one"))
    if optimizer.fused:
        clues.append(sign("the optimizer is fused: it computes in float32 and rounds its moments on storing them"))
    return clues


def _swallowed(case: Case) -> list[Clue]:
    half = [t for t in case.record.adapter if t.dtype == "bfloat16"]
    if not half:
        return []
    clues = [hint(f"{len(half)} trainable tensors are bfloat16, with 8 significant bits and no float32 copy")]
    still = [t for t in half if t.changed_fraction is not None and t.changed_fraction < 0.9]
    rates = [s.learning_rate for s in case.record.steps if s.learning_rate]
    # Adam moves an element by about one rate, and half a unit in its last place is the least that counts
    lost = [t for t in still if not t.changed_fraction and _rms(t) * 2.0**-9 > max(rates, default=math.inf)]
    if lost:
        clues.append(
            decisive(
                f"no element of {lost[0].name} ever changed: they are {_rms(lost[0]):.2g} in the mean square, and an"
                f" update of the learning rate {max(rates):.2g} rounds back"
            )
        )
    elif still:
        least = min(still, key=lambda t: t.changed_fraction or 0.0)
        clues.append(
            (decisive if least.changed_fraction else sign)(
                f"{least.changed_fraction:.1%} of the elements of {least.name} ever changed: the others are larger than"
                " 256 updates, and rounded back"
            )
        )
    clues += map(sign, case.failed(update_lower_bound.Reason.APART))
    decayed = _decay_lost(case)
    if decayed:
        clues.append(decisive(decayed))
    if case.poisoned is None:
        clues.append(hint("everything stayed finite: range was not the matter, resolution was"))
    return clues


def _rms(tensor: TensorRecord) -> float:
    """Root mean square of a tensor before the first step."""
    return (tensor.initial_norm or 0.0) / math.sqrt(max(tensor.elements, 1))


def _decay_lost(case: Case) -> str:
    """How much of a bfloat16 weight its decay takes in a step, where that rounds away; empty where it does not."""
    optimizer, rates = case.record.optimizer, [s.learning_rate for s in case.record.steps if s.learning_rate]
    if optimizer is None or not optimizer.weight_decay or not rates:
        return ""
    share = optimizer.weight_decay * max(rates)
    return f"weight decay takes {share:.2g} of a weight in a step, and less than 1/512 rounds away" * (share < 2.0**-9)


def _forward_overflow(case: Case) -> list[Clue]:
    first = case.lost
    if first is None or "float16" not in case.record.compute_dtypes or first.supervised_tokens == 0:
        return []
    if any(s.step < first.step and s.effect == "poisoned" for s in case.record.steps):
        return []
    clues = [
        hint(f"the raw loss of step {first.step} is {first.loss} while every weight was still finite"),
        sign(f"the adapted layers computed in float16, whose largest number is {_FLOAT16_LARGEST:.0f}"),
    ]
    reference = _float32_step(case, first.step)
    if reference is not None and all(map(math.isfinite, reference.micro_losses)):
        clues.append(sign(f"the same cell in float32 has a finite loss there ({reference.loss:.4g})"))
    elif reference is not None:
        clues += [against("the same cell in float32 loses its loss there, too")] * 2
    after = [s for s in case.record.steps if s.step >= first.step]
    if len(after) > 1 and case.poisoned is None and not any(math.isfinite(s.loss or math.nan) for s in after):
        clues.append(sign(f"no step from there on has a finite loss, though no weight was lost ({len(after)} steps)"))
    if case.failed(base_finite.Reason.NONFINITE):
        clues.append(against("the base's weights were not finite to begin with"))
    return clues


def _backward_overflow(case: Case) -> list[Clue]:
    bad = case.first(lambda s: not s.gradients_finite and all(map(math.isfinite, s.micro_losses)))
    if bad is None or "float16" not in case.record.compute_dtypes:
        return []
    if any(s.step < bad.step and s.effect == "poisoned" for s in case.record.steps):
        return []
    # a scaler that skips such a step does what it is for
    if bad.skipped:
        return []
    clues = [sign(f"the loss of step {bad.step} is finite and its gradients are not, in float16")]
    reference = _float32_step(case, bad.step)
    if reference is not None and reference.gradients_finite:
        clues.append(sign(f"the same cell in float32 has gradients of norm {reference.grad_norm:.4g} there"))
    elif reference is not None:
        clues.append(against("the same cell in float32 has gradients there that are not finite, too"))
    largest = max((s.max_abs_gradient or 0.0 for s in case.record.steps if s.gradients_finite), default=0.0)
    if largest > _FLOAT16_LARGEST / 100:
        clues.append(sign(f"other steps have gradients up to {largest:.3g}, near float16's largest number"))
    return clues


def _float32_step(case: Case, number: int) -> StepRecord | None:
    """The step of the float32 reference with this number; None where there is none."""
    reference = case.references.get("fp32")
    steps = () if reference is None or case.record.precision == "fp32" else reference.steps
    return next((s for s in steps if s.step == number and s.loss is not None), None)


def _gradient_underflow(case: Case) -> list[Clue]:
    record = case.record
    if record.loss_scaling or "float16" not in record.compute_dtypes or not record.steps:
        return []
    tiny = [s for s in record.steps if s.max_abs_gradient is not None and s.max_abs_gradient < 16 * _FLOAT16_SMALLEST]
    if not tiny:
        return []
    reference = _float32_step(case, tiny[0].step)
    # what is nothing in float32 did not get lost in float16
    if reference is not None and not reference.grad_norm:
        return []
    if not tiny[0].max_abs_gradient and reference is None:
        return []
    return [
        decisive(
            f"the largest gradient of step {tiny[0].step} is {tiny[0].max_abs_gradient:.3g}, at the edge of float16"
        ),
        hint("nothing scales the loss up"),
    ]


def _loss_scale_collapse(case: Case) -> list[Clue]:
    steps = case.record.steps
    skipped = [s for s in steps if s.skipped]
    if len(skipped) < 3 or len(skipped) * 2 < len(steps):
        return []
    last = skipped[-1].loss_scale_after
    return [
        sign(f"the scaler skipped {len(skipped)} of {len(steps)} steps, and the scale is {last:g} at the end"),
        *(
            [decisive("a scale below 1 scales nothing up: what overflows is not the scaled gradient")]
            if last is not None and last < 1
            else []
        ),
        *([] if case.lost else [hint("skipping did not cure it: it is no growth probe and no warm-up")]),
        *([hint("no parameter changed in the whole run")] if case.no_effect else []),
        *([hint("the loss itself is not finite")] if case.lost else []),
    ]


def _half_master(case: Case) -> list[Clue]:
    others = {f.invariant for f in case.verdict.failures} - _FOLLOWS_FROM_HALF_STATES
    narrow = fp32_master.Reason
    found = case.failed(narrow.NARROW_AT_FIRST, narrow.NARROW_AT_LAST, narrow.NARROW_STATES)
    return [(hint if others else decisive)(f) for f in found[:1]]


def _unscaled_half(case: Case) -> list[Clue]:
    error = case.error
    if error is None or "unscale FP16" not in error.message:
        return []
    return [decisive(f"the training ended in {error.type}: {error.message}")]


NUMBERS: tuple[Mechanism, ...] = (
    Mechanism(
        "eps_underflow_in_float16",
        "Adam's eps rounds to 0 in float16; where a gradient is exactly 0, as lora_A's is at step 1, the update is 0/0",
        "keep the adapter in float32: leave autocast_adapter_dtype=True in get_peft_model (or cast the trainable"
        " parameters to torch.float32), and use fp16=True or bf16=True for speed instead of float16 weights",
        _eps_underflow,
    ),
    Mechanism(
        "moments_underflow_in_float16",
        "squared gradients below 6e-8 are stored as 0, and the next update divides by eps alone",
        "keep the adapter, and with it the optimizer's moments, in float32 (autocast_adapter_dtype=True)",
        _half_moments,
    ),
    Mechanism(
        "updates_swallowed_in_bfloat16",
        "an update smaller than 1/256 of a weight rounds back to the same bfloat16 number, so that lora_A keeps its"
        " start",
        "keep the adapter in float32 (autocast_adapter_dtype=True), and use bf16=True for speed",
        _swallowed,
    ),
    Mechanism(
        "half_trainables_under_a_scaler",
        "the loss scaler does not unscale float16 gradients: it needs float32 trainables",
        "keep the adapter in float32 (autocast_adapter_dtype=True, no .half() after the wrap), with fp16=True",
        _unscaled_half,
    ),
    Mechanism(
        "loss_scale_collapse",
        "every step overflows, so the scaler skips it and halves the scale, which never cures the overflow",
        "find the overflow with a fp32 run of the same cell; then train in bf16-mixed",
        _loss_scale_collapse,
    ),
    Mechanism(
        "forward_overflow_in_float16",
        "an activation exceeds 65504, becomes infinite, and the loss NaN",
        "train in bf16-mixed, which has float32's range; a smaller loss scale does not help",
        _forward_overflow,
    ),
    Mechanism(
        "backward_overflow_in_float16",
        "a gradient exceeds 65504 on its way back, though the loss was finite",
        "let a dynamic loss scaler find a smaller scale (fp16=True), or train in bf16-mixed",
        _backward_overflow,
    ),
    Mechanism(
        "gradient_underflow_in_float16",
        "gradients below 6e-8 are 0 in float16, and nothing is learned from them",
        "scale the loss (fp16=True does), or train in bf16-mixed",
        _gradient_underflow,
    ),
    Mechanism(
        "half_precision_trainables",
        "trainable tensors or optimizer states are half precision: small updates and weight decay round away",
        "keep the adapter in float32 (autocast_adapter_dtype=True); where half precision is meant, waive fp32_master",
        _half_master,
        locates=True,
    ),
)
"""Causes in the number formats; of two that are worth the same, the earlier goes first."""
