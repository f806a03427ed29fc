"""Diagnosis: the mechanism that most probably lies behind a failed verdict, from the record alone.

One mechanism is one entry of `MECHANISMS`. Each looks for evidence in the record; the one with the most goes first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from pytest_sftguard.records import RunRecord, StepRecord
from pytest_sftguard.verdicts import Outcome, Verdict

_FLOAT16_SMALLEST = 2.0**-24


@dataclass(frozen=True)
class Diagnosis:
    """A named mechanism, and why it is thought to be the one."""

    mechanism: str
    """Name of the mechanism, an entry of the table."""
    summary: str
    """What happens, in one sentence."""
    evidence: tuple[str, ...]
    """What in the record speaks for it."""
    against: tuple[str, ...]
    """What in the record speaks against it."""
    cure: str
    """The change that removes it."""


@dataclass(frozen=True)
class Mechanism:
    """One entry of the table."""

    name: str
    """Its name."""
    summary: str
    """What happens, in one sentence."""
    cure: str
    """The change that removes it."""
    look: Callable[[RunRecord], tuple[list[str], list[str]]]
    """Gives the evidence for and against; without evidence for it the mechanism is not named."""


def diagnose(record: RunRecord, verdict: Verdict) -> list[Diagnosis]:
    """The mechanisms that the record has evidence for, the most probable first; empty where nothing failed."""
    if verdict.outcome is not Outcome.FAILED:
        return []
    found = []
    for mechanism in MECHANISMS:
        evidence, against = mechanism.look(record)
        if evidence:
            found.append(
                (
                    len(against) - len(evidence),
                    Diagnosis(mechanism.name, mechanism.summary, tuple(evidence), tuple(against), mechanism.cure),
                )
            )
    return [d for _, d in sorted(found, key=lambda pair: pair[0])]


def _first(record: RunRecord, condition: Callable[[StepRecord], bool]) -> StepRecord | None:
    return next((s for s in record.steps if condition(s)), None)


def _bad_loss(step: StepRecord) -> bool:
    return not all(map(math.isfinite, step.micro_losses))


def _half_trainables(record: RunRecord) -> bool:
    return any(t.dtype == "float16" for t in record.adapter)


def _eps_underflow(record: RunRecord) -> tuple[list[str], list[str]]:
    optimizer, poisoned = record.optimizer, _first(record, lambda s: bool(s.nonfinite_weights))
    if optimizer is None or optimizer.eps is None or poisoned is None or not _half_trainables(record):
        return [], []
    if not optimizer.eps < _FLOAT16_SMALLEST:
        return [], []
    evidence = [
        f"the trainable tensors are float16, and {optimizer.name} computes in their type",
        f"its eps {optimizer.eps:g} is below the smallest float16, 6e-8, and rounds to 0",
    ]
    against = []
    zero = set(poisoned.zero_gradients.first)
    struck = [n for n in poisoned.nonfinite_weights.first if n in zero]
    if struck:
        evidence.append(
            f"{len(struck)} tensors became NaN at step {poisoned.step}, where their gradient was exactly 0"
            f" (first: {struck[0]}): their update was 0 / (sqrt(0) + 0)"
        )
    else:
        against.append(f"no tensor that became NaN at step {poisoned.step} had a zero gradient there")
    if poisoned.gradients_finite and not _bad_loss(poisoned):
        evidence.append(f"loss and gradients of step {poisoned.step} were still finite: the optimizer made the NaN")
    else:
        against.append(f"loss or gradients were already not finite at step {poisoned.step}")
    if optimizer.fused:
        against.append("the optimizer is fused and computes in float32, though it stores float16")
    return evidence, against


def _half_moments(record: RunRecord) -> tuple[list[str], list[str]]:
    optimizer = record.optimizer
    if optimizer is None or "float16" not in optimizer.state_dtypes:
        return [], []
    jumps = [
        s for s in record.steps
        if s.max_update is not None and s.learning_rate and s.max_update > 10 * s.learning_rate
    ]  # fmt: skip
    if not jumps:
        return [], []
    first = jumps[0]
    ratio = (first.max_update or 0.0) / (first.learning_rate or 1.0)
    return [
        f"the optimizer keeps its moments in float16 ({', '.join(optimizer.state_dtypes)})",
        f"an element moved by {ratio:.3g} learning rates at step {first.step}; Adam moves about one",
    ], []


def _forward_overflow(record: RunRecord) -> tuple[list[str], list[str]]:
    first = _first(record, _bad_loss)
    if first is None or "float16" not in record.compute_dtypes or first.supervised_tokens == 0:
        return [], []
    before = [s for s in record.steps if s.step < first.step and s.effect == "poisoned"]
    if before:
        return [], []
    return [
        f"the raw loss of step {first.step} is {first.loss} while every weight was still finite",
        "the adapted layers computed in float16, whose largest number is 65504",
    ], []


def _loss_scale_collapse(record: RunRecord) -> tuple[list[str], list[str]]:
    skipped = [s for s in record.steps if s.effect == "skipped_by_scaler"]
    if len(skipped) < 3 or len(skipped) * 2 < len(record.steps):
        return [], []
    return [
        f"the scaler skipped {len(skipped)} of {len(record.steps)} steps, and the scale is"
        f" {skipped[-1].loss_scale_after:g} at the end",
    ], []


def _labels_masked(record: RunRecord) -> tuple[list[str], list[str]]:
    empty = [s.step for s in record.steps if s.supervised_tokens == 0]
    if not empty:
        return [], []
    return [
        f"{len(empty)} of {len(record.steps)} steps hold no label that is not -100 (first: step {empty[0]})",
        "a loss without labels is 0/0, its gradient is 0, and the Trainer logs both as 0.0",
    ], []


def _not_in_optimizer(record: RunRecord) -> tuple[list[str], list[str]]:
    if record.optimizer is None or record.optimizer.owns_trainables is not False:
        return [], []
    return ["the parameters of the optimizer are not the trainable parameters of the model"], []


def _frozen(record: RunRecord) -> tuple[list[str], list[str]]:
    if record.adapter or not record.steps:
        return [], []
    return ["no parameter of the model takes a gradient, and yet the run went through"], []


def _no_learning_rate(record: RunRecord) -> tuple[list[str], list[str]]:
    idle = [s for s in record.steps if s.effect == "no_effect" and s.learning_rate == 0]
    if len(idle) < 2:
        return [], []
    return [f"{len(idle)} of {len(record.steps)} steps had learning rate 0 and changed nothing"], []


def _divergence(record: RunRecord) -> tuple[list[str], list[str]]:
    finite = [x for x in record.losses if math.isfinite(x)]
    if len(finite) < 2 or not max(finite) > 2 * finite[0]:
        return [], []
    against = ["the adapter is float16, which has its own way to infinity"] if _half_trainables(record) else []
    return [f"the raw loss rose from {finite[0]:.3g} to {max(finite):.3g} before it was lost"], against


MECHANISMS: tuple[Mechanism, ...] = (
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
        "forward_overflow_in_float16",
        "an activation exceeds 65504, becomes infinite, and the loss NaN",
        "train in bf16-mixed, which has float32's range; a smaller loss scale does not help",
        _forward_overflow,
    ),
    Mechanism(
        "loss_scale_collapse",
        "every step overflows, so the scaler skips it and halves the scale, which never cures the overflow",
        "find the overflow with a fp32 run of the same cell; then train in bf16-mixed",
        _loss_scale_collapse,
    ),
    Mechanism(
        "all_labels_masked",
        "whole batches have no supervised token, so that there is nothing to learn from",
        "look at the labels of the first batches: truncation, a template that is not found, or an empty assistant mask",
        _labels_masked,
    ),
    Mechanism(
        "adapter_not_in_optimizer",
        "the optimizer was made for other parameters than those that train",
        "build the optimizer after get_peft_model, or let the Trainer build it",
        _not_in_optimizer,
    ),
    Mechanism(
        "adapter_frozen",
        "the adapter takes no gradient; gradient checkpointing turns the crash that this would be into silence",
        "load adapters for training with PeftModel.from_pretrained(..., is_trainable=True)",
        _frozen,
    ),
    Mechanism(
        "learning_rate_zero",
        "the schedule gives no learning rate, as a warm-up longer than the run does",
        "shorten the warm-up, or train more steps",
        _no_learning_rate,
    ),
    Mechanism(
        "divergence",
        "the updates are too large for the loss surface",
        "lower the learning rate or lora_alpha, or clip the gradients",
        _divergence,
    ),
)
"""Every mechanism that is told apart; where two have as much evidence, the earlier one goes first."""
