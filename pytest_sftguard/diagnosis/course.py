"""Causes in the course of the training: the rate, the gradients on their way, the optimizer's state, the log."""

from __future__ import annotations

import math

from pytest_sftguard.diagnosis.case import Case, Clue, against, decisive, hint, shown_by, sign
from pytest_sftguard.diagnosis.mechanism import Mechanism
from pytest_sftguard.invariants import answers_beat_base, effective_steps, log_honest, lr_trace, norm_honest

_OFF_SCHEDULE = (lr_trace.Reason.ELSEWHERE, lr_trace.Reason.OFF_SCHEDULE)
"""A rate of another place of the schedule, or of none; one that is 0 or NaN says nothing of the schedule's pace."""


def _no_learning_rate(case: Case) -> list[Clue]:
    steps = case.record.steps
    idle = [s for s in steps if s.learning_rate == 0 and s.effect in ("no_effect", "poisoned")]
    if len(idle) < 2:
        return []
    return [
        sign(f"{len(idle)} of {len(steps)} steps had the learning rate 0 and changed nothing"),
        *([sign("no parameter changed in the whole run")] if case.no_effect else []),
        *map(hint, case.failed("lr_trace")[:1]),
    ]


def _too_high(case: Case) -> list[Clue]:
    record = case.record
    finite = [x for x in record.losses if math.isfinite(x)]
    clues = []
    if len(finite) >= 2 and max(finite) > 2 * finite[0]:
        clues.append(sign(f"the raw loss rose from {finite[0]:.3g} to {max(finite):.3g}"))
    clues += shown_by("one_batch_overfit", clue=sign)(case)
    clues += shown_by(answers_beat_base.Reason.COLLAPSED, clue=sign)(case)
    if clues and case.trainables_are("float16"):
        clues.append(against("the adapter is float16, which has its own way to infinity"))
    if clues and case.failed("supervision_audit"):
        clues.append(against("the labels are wrong, whatever the learning rate"))
    return clues


def _too_fast(case: Case) -> list[Clue]:
    found = case.failed(*_OFF_SCHEDULE)
    if not found or any(s.scale_fell for s in case.record.steps):
        return []
    return [
        decisive(found[0]),
        hint("no step was skipped that the schedule could have waited for"),
        *([against("weights or moments are not finite")] if case.poisoned else []),
    ]


def _runs_at_skipped(case: Case) -> list[Clue]:
    found = case.failed(*_OFF_SCHEDULE)
    if not found or not any(s.scale_fell for s in case.record.steps):
        return []
    clues = [sign(found[0]), hint("the loss scaler skipped steps, and the schedule did not wait")]
    if case.record.optimizer is not None and case.record.optimizer.fused:
        clues.append(decisive("the optimizer is fused: accelerate reports no step as skipped (accelerate#4242)"))
    if case.poisoned:
        clues += [against("weights or moments are not finite"), against("what it did to the rate came after")]
    return clues


def _no_step(case: Case) -> list[Clue]:
    record = case.record
    if record.steps or (record.error is not None and record.error.stage in ("build", "train")):
        return []
    return [decisive(f"no optimizer step was taken, and the Trainer counted {record.global_step}, without a word")]


def _clipped(case: Case) -> list[Clue]:
    bad = case.first(lambda s: not (s.gradients_finite or s.skipped))
    if bad is None or not case.record.max_grad_norm:
        return []
    if not all(map(math.isfinite, bad.micro_losses)) or "float16" in case.record.compute_dtypes:
        return []
    if any(s.effect == "poisoned" and s.step < bad.step for s in case.record.steps):
        return []
    return [
        sign(f"{bad.nonfinite_gradients} had a gradient that is not finite at step {bad.step}; the loss was finite"),
        sign(
            f"clipping to {case.record.max_grad_norm:g} multiplies every gradient by {case.record.max_grad_norm:g}/norm"
        ),
        *([hint("from then on the weights are not finite")] if bad.effect == "poisoned" else []),
    ]


def _poisoned_state(case: Case) -> list[Clue]:
    bad = case.first(lambda s: bool(s.nonfinite_moments))
    if bad is None or (not bad.gradients_finite and bad.effect != "poisoned"):
        return []
    if case.lost is not None and case.lost.step <= bad.step:
        return []
    earlier = [s for s in case.record.steps if s.step <= bad.step and not s.scale_fell]
    if any(not s.gradients_finite for s in earlier) or (bad.nonfinite_weights and case.trainables_are("float16")):
        return []
    if bad.nonfinite_weights:
        return [
            sign(f"loss and gradients were finite up to step {bad.step}, whose update was not"),
            sign(f"{bad.nonfinite_moments} is not finite either"),
        ]
    skipped = [s.step for s in case.record.steps if s.scale_fell and s.step <= bad.step]
    return [
        decisive(f"{bad.nonfinite_moments} is not finite after step {bad.step}, where weights and gradients are"),
        *([sign(f"step {skipped[-1]} was discarded by the loss scaler before")] if skipped else []),
    ]


def _nan_adapter(case: Case) -> list[Clue]:
    """NaN that came into the weights after the last step, or between two."""
    record = case.record
    bad = [t for t in record.adapter if t.final_norm is not None and not math.isfinite(t.final_norm)]
    if not bad or any(s.effect == "poisoned" or not s.gradients_finite for s in record.steps) or case.lost:
        return []
    return [decisive(f"{bad[0].name} is not finite at the end, though it was after the last optimizer step")]


def _laundered(case: Case) -> list[Clue]:
    found = case.failed(log_honest.Reason.LAUNDERED_GRADIENTS, log_honest.Reason.LAUNDERED_LOSS)
    if not found:
        return []
    struck = case.first(lambda s: not s.gradients_finite or not all(map(math.isfinite, s.micro_losses)))
    if case.poisoned is not None or struck is None or struck.effect != "applied":
        return [sign(found[0])]
    return [decisive(found[0]), sign("the weights stayed finite, so that nothing else shows it")]


COURSE: tuple[Mechanism, ...] = (
    Mechanism(
        "learning_rate_zero",
        "the schedule gives no learning rate, as a warm-up longer than the run does",
        "shorten the warm-up, or train more steps",
        _no_learning_rate,
    ),
    Mechanism(
        "schedule_runs_at_skipped_steps",
        "the loss scaler skips steps and the schedule goes on, so that the rate is gone before anything is learned",
        "cure the overflow; or use an optimizer that is not fused (optim='adamw_torch'), for which accelerate waits",
        _runs_at_skipped,
    ),
    Mechanism(
        "schedule_too_fast",
        "the schedule is stepped more than once per optimizer step, and the learning rate ends early",
        "step the scheduler once per optimizer step: not per micro-batch, per process or in a callback beside the loop",
        _too_fast,
    ),
    Mechanism(
        "learning_rate_too_high",
        "the updates are too large for the loss surface: the loss rises, or settles where every answer is the same",
        "lower the learning rate or lora_alpha, or clip the gradients",
        _too_high,
    ),
    Mechanism(
        "no_step_taken",
        "the training loop ended without an optimizer step, and raised nothing",
        "look at the data loader: drop_last with fewer rows than a batch, an empty data set, or max_steps",
        _no_step,
    ),
    Mechanism(
        "nonfinite_gradient_clipped",
        "a gradient that is not finite makes the norm so, and clipping by that norm spoils all the others",
        "clip with error_if_nonfinite=True, or skip such steps; look at the layer that the finding names",
        _clipped,
    ),
    Mechanism(
        "optimizer_state_poisoned",
        "NaN or infinity has come into the optimizer's state, as from a step that the scaler discarded",
        "update the optimizer's state after the overflow check only",
        _poisoned_state,
    ),
    Mechanism(
        "nan_in_adapter",
        "the adapter's weights were made NaN by something else than the optimizer",
        "look at the callbacks, and at what saves and loads the adapter",
        _nan_adapter,
    ),
    Mechanism(
        "weights_changed_from_outside",
        "something else than the optimizer changes the adapter between steps",
        "look for callbacks that restore, average or reload weights",
        shown_by(effective_steps.Reason.CHANGED_BETWEEN),
    ),
    Mechanism(
        "gradients_not_cleared",
        "gradients of earlier steps are added to those of the next",
        "call zero_grad once per optimizer step",
        shown_by(effective_steps.Reason.STALE_GRADIENTS),
    ),
    Mechanism(
        "log_laundered",
        "the log, or the optimizer, was given finite numbers in the place of NaN",
        "set logging_nan_inf_filter=False, and take nan_to_num and the like out of loss and gradients",
        _laundered,
    ),
    Mechanism(
        "gradients_altered",
        "the norm in the log is not that of the gradients that the backward pass made",
        "look for what scales, clips or cleans gradients between backward and the optimizer",
        shown_by(norm_honest.Reason.GIVEN, norm_honest.Reason.LOGGED, clue=sign),
    ),
)
"""Causes in the course of the training; of two that are worth the same, the earlier goes first."""
