"""Causes in how the training is put together: which tensors train, on what labels, at what rate."""

from __future__ import annotations

import math

from pytest_sftguard.diagnosis.case import Case, Clue, against, hint, sign
from pytest_sftguard.diagnosis.mechanism import Mechanism


def _labels_masked(case: Case) -> list[Clue]:
    steps = case.record.steps
    empty = [s.step for s in steps if s.supervised_tokens == 0]
    if not empty:
        return []
    return [
        sign(f"{len(empty)} of {len(steps)} steps hold no label that is not -100 (first: step {empty[0]})"),
        sign("a loss without labels is 0/0, its gradient is 0, and the Trainer logs both as 0.0"),
        *([hint("the gradients are exactly 0, not NaN")] if all(s.grad_norm == 0 for s in steps) else []),
    ]


def _not_in_optimizer(case: Case) -> list[Clue]:
    optimizer = case.record.optimizer
    if optimizer is None or optimizer.owns_trainables is not False:
        return []
    clues = [sign("the parameters of the optimizer are not the trainable parameters of the model")]
    if case.no_effect:
        clues.append(sign("gradients are there, and no step changed a parameter"))
    return clues


def _frozen(case: Case) -> list[Clue]:
    if case.record.adapter or not case.record.steps:
        return []
    return [
        sign("no parameter of the model takes a gradient, and yet the run went through"),
        hint("gradient checkpointing makes the embeddings require gradients, so that backward does not raise"),
    ]


def _no_learning_rate(case: Case) -> list[Clue]:
    steps = case.record.steps
    idle = [s for s in steps if s.effect == "no_effect" and s.learning_rate == 0]
    if len(idle) < 2:
        return []
    return [sign(f"{len(idle)} of {len(steps)} steps had learning rate 0 and changed nothing")]


def _divergence(case: Case) -> list[Clue]:
    finite = [x for x in case.record.losses if math.isfinite(x)]
    if len(finite) < 2 or not max(finite) > 2 * finite[0]:
        return []
    clues = [sign(f"the raw loss rose from {finite[0]:.3g} to {max(finite):.3g}")]
    if case.trainables_are("float16"):
        clues.append(against("the adapter is float16, which has its own way to infinity"))
    return clues


WIRING: tuple[Mechanism, ...] = (
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
        "learning_rate_too_high",
        "the updates are too large for the loss surface: the loss rises, or settles where every answer is the same",
        "lower the learning rate or lora_alpha, or clip the gradients",
        _divergence,
    ),
)
"""Causes in the wiring; of two that are worth the same, the earlier goes first."""
