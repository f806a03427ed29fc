"""Causes in the course of the training: the rate, the gradients on their way, the optimizer's state, the log."""

from __future__ import annotations

import math
import statistics

from pytest_sftguard.diagnosis.case import Case, Clue, against, decisive, hint, shown_by, sign
from pytest_sftguard.diagnosis.mechanism import Mechanism
from pytest_sftguard.invariants import (
    adapter_reached,
    answers_beat_base,
    effective_steps,
    every_factor_moves,
    factor_gradients_agree,
    gradient_present,
    log_honest,
    loss_counts_once,
    loss_is_the_models,
    lr_trace,
    norm_honest,
    one_batch_overfit,
    optimizer_owns_trainables,
    update_lower_bound,
    update_repeats,
    update_upper_bound,
    weights_and_moments_finite,
)
from pytest_sftguard.records import StepRecord

_OFF_SCHEDULE = (lr_trace.Reason.ELSEWHERE, lr_trace.Reason.OFF_SCHEDULE)
"""A rate of another place of the schedule, or of none; one that is 0 or NaN says nothing of the schedule's pace."""
_CHANGED = tuple(
    r for r in loss_is_the_models.Reason if r.name.startswith(("MULTIPLIED", "SHIFTED", "ROUNDED", "OFFSET"))
)
"""A rule by which losses come from the model's."""
_RTOL = 1e-3
"""How closely two norms of the same gradients agree, as a share; norms in half precision are told apart by more."""
_LARGE_STEP = 0.3
"""Share of the root mean square of an untrained `lora_A` that one step moves an element by, from which on a rate is
large. Measured: 0.01 at the usual 1e-3, 0.1 to 0.2 at the largest rates that small models learn at, 1 where the rate is
twenty times too high."""


def _pace(case: Case) -> list[tuple[int, float, float]] | None:
    """Step, used rate and due rate of each step; None where the schedule is not known, or moves too little to tell."""
    schedule, steps = case.record.schedule, case.record.steps
    if schedule is None or schedule.unknown or len(schedule.rates) < len(steps) or not case.failed(*_OFF_SCHEDULE):
        return None
    rates = [s.learning_rate for s in steps]
    if len(set(schedule.rates)) < 2 or not all(r is not None and math.isfinite(r) for r in rates):
        return None
    return [(s.step, s.learning_rate or 0.0, schedule.rates[i]) for i, s in enumerate(steps)]


def _equal(used: float, due: float) -> bool:
    return math.isclose(used, due, rel_tol=1e-5, abs_tol=1e-15)


def _follows(case: Case, places: list[int]) -> bool:
    """Whether the used rates are the schedule's at `places`, from 0, as far as it was computed, and not their own."""
    pace, schedule = _pace(case), case.record.schedule
    if pace is None or schedule is None:
        return False
    known = [(used, due, p) for (_, used, due), p in zip(pace, places, strict=True) if p < len(schedule.rates)]
    same = all(_equal(used, schedule.rates[p]) for used, _, p in known)
    return len(known) > 1 and same and any(not _equal(used, due) for used, due, _ in known)


def _too_fast(case: Case) -> list[Clue]:
    found, count = case.failed(*_OFF_SCHEDULE), len(case.record.steps)
    if not found or any(s.scale_fell for s in case.record.steps):
        return []
    often = {2, case.record.gradient_accumulation_steps, *range(3, 9)} - {1}
    # stepped before the optimizer, or after it
    starts = [(n, b) for n in sorted(often) for b in (0, n - 1)]
    fast = next((n for n, b in starts if _follows(case, [b + n * i for i in range(count)])), None)
    return [] if fast is None else [decisive(found[0]), hint(f"it moves {fast} places in each optimizer step")]


def _does_not_move(case: Case) -> list[Clue]:
    pace, found = _pace(case), case.failed(*_OFF_SCHEDULE)
    if pace is None or len(pace) < 3:
        return []
    used = {rate for _, rate, _ in pace}
    if len(used) > 1 or not _equal(used.pop(), pace[0][2]):
        return []
    return [
        decisive(found[0]),
        hint(f"all {len(pace)} steps had the schedule's first rate, and by the last it should be {pace[-1][2]:g}"),
    ]


def _too_slow(case: Case) -> list[Clue]:
    count, found = len(case.record.steps), case.failed(*_OFF_SCHEDULE)
    if not found or len({s.learning_rate for s in case.record.steps}) < 2:
        return []
    slow = next((n for n in range(2, count) if _follows(case, [i // n for i in range(count)])), None)
    return [] if slow is None else [decisive(found[0]), hint(f"it moves one place in {slow} optimizer steps")]


def _runs_at_skipped(case: Case) -> list[Clue]:
    found, steps = case.failed(*_OFF_SCHEDULE), case.record.steps
    if not found or not any(s.scale_fell for s in steps):
        return []
    clues: list[Clue] = [hint("the loss scaler skipped steps, and the schedule did not wait")]
    if _follows_steps(case):
        clues.append(decisive(found[0]))
    if case.record.optimizer is not None and case.record.optimizer.fused:
        clues.append(sign("the optimizer is fused: accelerate reports no step as skipped (accelerate#4242)"))
    # what made every step overflow comes before what that did to the rate
    if case.poisoned or case.lost:
        clues += [against("a loss, weight or moment is not finite: what it did to the rate came after")] * 3
    return clues


def _follows_steps(case: Case) -> bool:
    """Whether each step had the rate that its own number has, skipped ones counted."""
    schedule, steps = case.record.schedule, case.record.steps
    if schedule is None or len(schedule.rates) < len(steps) or len(set(schedule.rates)) < 2:
        return False
    pairs = zip(steps, schedule.rates, strict=False)
    return all(s.learning_rate is not None and _equal(s.learning_rate, rate) for s, rate in pairs)


def _rate_from_elsewhere(case: Case) -> list[Clue]:
    found = case.failed(*_OFF_SCHEDULE)
    return [decisive(found[0])] if found and case.lost is None and case.poisoned is None else []


def _no_learning_rate(case: Case) -> list[Clue]:
    record = case.record
    idle = [s for s in record.steps if s.learning_rate == 0 and s.effect in ("no_effect", "poisoned")]
    if len(idle) < 2:
        return []
    seen = f"{len(idle)} of {len(record.steps)} steps had the learning rate 0 and changed nothing"
    prescribed = record.schedule is not None and not record.schedule.unknown and not case.failed(*_OFF_SCHEDULE)
    # a schedule that runs ahead ends in zeros, too
    from_the_start = record.steps[0].learning_rate == 0
    return [
        decisive(seen) if from_the_start or prescribed else hint(seen),
        *([hint("no parameter changed in the whole run")] if case.no_effect else []),
        *map(hint, case.failed("lr_trace")[:1]),
    ]


def _rate_not_finite(case: Case) -> list[Clue]:
    bad = case.first(lambda s: s.learning_rate is not None and not math.isfinite(s.learning_rate))
    if bad is None or any(s.effect == "poisoned" and s.step < bad.step for s in case.record.steps):
        return []
    return [decisive(f"the learning rate of step {bad.step} is {bad.learning_rate}, where every weight was finite")]


def _group_without_rate(case: Case) -> list[Clue]:
    optimizer = case.record.optimizer
    if optimizer is None or not optimizer.without_rate:
        return []
    return [
        decisive(f"the group of {optimizer.without_rate} has the learning rate 0, and another group has one"),
        *map(hint, case.failed(every_factor_moves.Reason.STILL_AT_STEP)[:1]),
    ]


def _too_high(case: Case) -> list[Clue]:
    record = case.record
    finite = [x for x in record.losses if math.isfinite(x)]
    known = record.first_step.token_loss if record.first_step is not None else None
    # a loss that begins near zero, or has a constant taken off, doubles at nothing
    scale = max(abs(finite[0]), abs(known or 0.0), 0.05) if finite else math.inf
    clues = []
    if len(finite) >= 2 and max(finite) > finite[0] + scale:
        clues.append(sign(f"the raw loss rose from {finite[0]:.3g} to {max(finite):.3g}"))
    settled = one_batch_overfit.Reason
    clues += shown_by(settled.DEAD, settled.SETTLED, settled.DOES_NOT_FALL, clue=sign)(case)
    clues += shown_by(answers_beat_base.Reason.COLLAPSED, clue=hint if clues else sign)(case)
    if not clues:
        return []
    share = _step_size(case)
    if share is not None and share >= _LARGE_STEP:
        clues.append(sign(f"a step moves an element by {share:.2g} of the untrained lora_A's root mean square"))
    if case.trainables_are("float16"):
        clues.append(against("the adapter is float16, which has its own way to infinity"))
    if case.failed("supervision_audit"):
        clues.append(against("the labels are wrong, whatever the learning rate"))
    return clues


def _step_size(case: Case) -> float | None:
    """Largest rate of the run, as a share of the smallest root mean square of a `lora_A` at its start."""
    factors = [t for t in case.record.adapter if "lora_A" in t.name.split(".") and t.initial_norm and t.elements]
    rates = [s.learning_rate for s in case.record.steps if s.learning_rate]
    if not factors or not rates:
        return None
    return max(rates) / min((t.initial_norm or 0.0) / math.sqrt(t.elements) for t in factors)


def _no_step(case: Case) -> list[Clue]:
    record = case.record
    if record.steps or (record.error is not None and record.error.stage in ("build", "train")):
        return []
    return [decisive(f"no optimizer step was taken, and the Trainer counted {record.global_step}, without a word")]


def _backward_broke(case: Case) -> StepRecord | None:
    """The first step that was taken with a gradient that is not finite, where loss and weights were until then."""
    bad = case.first(lambda s: not s.skipped and s.grad_norm is not None and not s.gradients_finite)
    if bad is None or not all(map(math.isfinite, bad.micro_losses)) or "float16" in case.record.compute_dtypes:
        return None
    if any(s.effect == "poisoned" and s.step < bad.step for s in case.record.steps):
        return None
    return None if case.lost is not None and case.lost.step < bad.step else bad


def _clipped(case: Case) -> list[Clue]:
    bad, limit = _backward_broke(case), case.record.max_grad_norm
    if bad is None or not limit or not bad.nonfinite_gradients:
        return []
    if not bad.nonfinite_gradients.count < len(case.record.adapter) - bad.missing_gradients.count:
        return []
    return [
        sign(f"{bad.nonfinite_gradients} had a gradient that is not finite at step {bad.step}; the loss was finite"),
        sign(f"clipping to {limit:g} multiplies every gradient by {limit:g}/norm, and that norm is not finite"),
        *([hint("from then on weights or moments are not finite")] if bad.effect == "poisoned" else []),
    ]


def _backward_not_finite(case: Case) -> list[Clue]:
    bad = _backward_broke(case)
    if bad is None:
        return []
    names = bad.nonfinite_gradients or "the gradients"
    return [decisive(f"at step {bad.step} loss and weights were finite, and {names} had a gradient that is not")]


def _poisoned_state(case: Case) -> list[Clue]:
    bad = case.first(lambda s: bool(s.nonfinite_moments))
    if bad is None or (not bad.gradients_finite and bad.effect != "poisoned"):
        return []
    # the optimizer was given what is not finite, which backward had not made
    if bad.gradients_finite and bad.received_grad_norm is not None and not math.isfinite(bad.received_grad_norm):
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
        *([hint(f"step {skipped[-1]} was discarded by the loss scaler before")] if skipped else []),
    ]


def _update_not_finite(case: Case) -> list[Clue]:
    bad = case.poisoned
    found = case.failed(weights_and_moments_finite.Reason.WEIGHTS)
    if bad is None or not found or not bad.gradients_finite or not bad.nonfinite_weights:
        return []
    given = bad.received_grad_norm
    if _rate_not_finite(case) or (given is not None and not math.isfinite(given)):
        return []
    earlier = [s for s in case.record.taken_steps if s.step <= bad.step]
    if not all(s.gradients_finite and all(map(math.isfinite, s.micro_losses)) for s in earlier):
        return []
    return [decisive(found[0]), hint(f"loss and gradients were finite up to and in step {bad.step}")]


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
        return [hint(found[0])]
    return [decisive(found[0]), sign("the weights stayed finite, so that nothing else shows it")]


def _given(case: Case) -> list[StepRecord]:
    """The steps whose optimizer received other gradients than backward made, clipped; empty where none did."""
    if not case.failed(norm_honest.Reason.GIVEN):
        return []
    seen = [s for s in case.record.taken_steps if s.grad_norm and s.received_grad_norm is not None]
    return [s for s in seen if math.isfinite(s.grad_norm or math.nan) and math.isfinite(s.received_grad_norm or 0.0)]


def _clipping_left_out(case: Case) -> list[Clue]:
    steps, limit = _given(case), case.record.max_grad_norm
    over = [s for s in steps if limit and (s.grad_norm or 0.0) > limit * (1 + _RTOL)]
    if not over or not all(math.isclose(s.received_grad_norm or 0.0, s.grad_norm or 0.0, rel_tol=_RTOL) for s in steps):
        return []
    return [
        *map(decisive, case.failed(norm_honest.Reason.GIVEN)[:1]),
        hint(f"so were all {len(steps)} steps: the optimizer was given the gradients as backward made them"),
    ]


def _clipped_elsewhere(case: Case) -> list[Clue]:
    """Every norm is clipped at one number, which is not the one that was asked for."""
    steps, limit = _given(case), case.record.max_grad_norm
    given = [s.received_grad_norm or 0.0 for s in steps]
    reduced = [g for s, g in zip(steps, given, strict=True) if g < (s.grad_norm or 0.0) * (1 - _RTOL)]
    if len(reduced) < 3:
        return []
    own = statistics.median(reduced)
    # gradients that something scales after the clipping have one norm, too; only a clip leaves small ones alone
    small = [g for s, g in zip(steps, given, strict=True) if (s.grad_norm or 0.0) < own * (1 - _RTOL)]
    if not small or (limit and math.isclose(own, limit, rel_tol=0.05)):
        return []
    if not all(math.isclose(g, min(s.grad_norm or 0.0, own), rel_tol=0.01) for s, g in zip(steps, given, strict=True)):
        return []
    scale = next((s.loss_scale for s in steps if s.loss_scale), None)
    if limit and scale and math.isclose(own * scale, limit, rel_tol=0.05):
        return []
    found = case.failed(norm_honest.Reason.GIVEN)
    return [decisive(found[0]), hint(f"every norm above {own:.4g} is clipped to it, and max_grad_norm is {limit}")]


def _clipped_before_unscaling(case: Case) -> list[Clue]:
    steps, limit = _given(case), case.record.max_grad_norm
    scaled = [s for s in steps if limit and s.loss_scale and (s.grad_norm or 0.0) * s.loss_scale > limit]
    given = [(s.received_grad_norm or 0.0) * (s.loss_scale or 0.0) for s in scaled]
    near = [s for s, norm in zip(scaled, given, strict=True) if math.isclose(norm, limit or 0.0, rel_tol=0.05)]
    if not near or len(near) < len(scaled):
        return []
    found = case.failed(norm_honest.Reason.GIVEN)
    return [
        decisive(found[0]),
        hint(f"times the loss scale {near[0].loss_scale:g} that is {limit:g}, the threshold of the clipping"),
    ]


def _altered(case: Case) -> list[Clue]:
    if _clipping_left_out(case) or _clipped_elsewhere(case) or _clipped_before_unscaling(case):
        return []
    zeroed = case.failed(log_honest.Reason.ZEROED_GRADIENTS)
    given = case.failed(norm_honest.Reason.GIVEN, norm_honest.Reason.PARTED)
    # where one step gives NaN, what the next ones do follows from it
    lost = case.lost is not None and bool(given) and (given[0].step or 0) >= case.lost.step
    return [] if lost else [decisive(f) for f in [*zeroed, *given][:1]]


def _logged(case: Case) -> list[Clue]:
    """A norm that is wrong in the log, where nothing was clipped and the optimizer was given the right gradients."""
    found = case.failed(norm_honest.Reason.LOGGED)
    step, limit = case.step(found[0].step) if found else None, case.record.max_grad_norm
    if step is None or step.grad_norm is None or case.failed(norm_honest.Reason.GIVEN):
        return []
    return [decisive(found[0])] if not limit or step.grad_norm <= limit else []


def _norm_before_clipping(case: Case) -> list[Clue]:
    """The same where clipping hides which it is: the log alone, or the gradients before they were clipped."""
    if _logged(case) or case.failed(norm_honest.Reason.GIVEN):
        return []
    return shown_by(norm_honest.Reason.LOGGED)(case)


def _logged_loss(case: Case) -> list[Clue]:
    return shown_by(log_honest.Reason.OTHER_LOSS, log_honest.Reason.OTHER_MEAN)(case) if case.finite else []


def _below_eps(case: Case) -> list[Clue]:
    optimizer, steps = case.record.optimizer, [s for s in case.record.taken_steps if s.max_abs_gradient]
    if optimizer is None or not optimizer.betas or not optimizer.eps or not steps or case.half_trainables:
        return []
    largest = max(s.max_abs_gradient or 0.0 for s in steps)
    ratios = [s.max_update_ratio for s in steps if s.max_update_ratio is not None]
    if not largest < 0.1 * optimizer.eps or not ratios or not max(ratios) < 0.5:
        return []
    return [
        decisive(f"the largest gradient of the run is {largest:.3g}, and the optimizer's eps {optimizer.eps:g}"),
        hint(f"an element moves by {max(ratios):.2g} learning rates at most, where Adam moves it by about one"),
    ]


def _unmoved(case: Case) -> StepRecord | None:
    """The first step that was not skipped and changed nothing, though it had rate and gradients."""
    found = case.failed(effective_steps.Reason.UNMOVED)
    step = case.step(found[0].step) if found else None
    has_rate = step is not None and bool(step.learning_rate) and bool(step.grad_norm) and step.gradients_finite
    return step if has_rate and step is not None and step.received_grad_norm != 0 else None


def _steps_left_out(case: Case) -> list[Clue]:
    step = _unmoved(case)
    if step is None or case.no_effect or case.half_trainables:
        return []
    return [decisive(f) for f in case.failed(effective_steps.Reason.UNMOVED)[:1]]


def _part_not_stepped(case: Case) -> list[Clue]:
    """A tensor that has a gradient, and that a step leaves as it is while it changes others."""
    found = case.failed(every_factor_moves.Reason.STILL_AT_STEP)
    step = case.step(found[0].step) if found else None
    if step is None or not step.changed or not step.learning_rate or case.half_trainables:
        return []
    names = found[0].evidence.get("names")
    without = {*step.zero_gradients.first, *step.missing_gradients.first}
    left = [n for n in getattr(names, "first", ()) if n not in without]
    if not left or not step.gradients_finite:
        return []
    gone = case.failed(optimizer_owns_trainables.Reason.LACKING, optimizer_owns_trainables.Reason.OTHERS)
    if gone:
        return []
    return [decisive(found[0]), hint(f"{left[0]} had a gradient there, and there was a learning rate")]


def _elements_left_out(case: Case) -> list[Clue]:
    """Elements of a float32 tensor that never move, though their neighbours do."""
    found = case.failed(every_factor_moves.Reason.PARTLY)
    if not found or case.half_trainables or not case.finite or not (found[0].observed or 0.0) > 0:
        return []
    return [decisive(found[0]), hint("the tensors are float32, in which no such update rounds away")]


def _gradient_stops(case: Case) -> list[Clue]:
    """Tensors that backward gives no gradient, while it gives others one."""
    reason = gradient_present.Reason
    found = [f for f in case.failed(reason.MISSING, reason.NEVER, reason.ZERO) if not _is_consequence(case, f.step)]
    steps = [s for s in case.record.taken_steps if not found or found[0].step in (None, s.step)]
    step = steps[0] if steps else None
    if step is None or not step.grad_norm or not step.gradients_finite or "float16" in case.record.compute_dtypes:
        return []
    return [decisive(found[0]), hint(f"the others had gradients of norm {step.grad_norm:.3g}")] if found else []


def _is_consequence(case: Case, step: int | None) -> bool:
    """Whether a factor had stayed at zero by `step`, which shields its partner: what is missing comes from that."""
    still = case.failed(every_factor_moves.Reason.STILL_AT_STEP)
    return step is not None and any(f.step is not None and f.step < step for f in still)


def _no_gradient_at_all(case: Case) -> list[Clue]:
    """A finite loss over labels, and gradients that are all exactly zero."""
    record = case.record
    empty = case.first(lambda s: s.grad_norm == 0 and not s.skipped)
    wiring, start = record.wiring, record.initial
    if empty is None or not record.adapter or empty.supervised_tokens == 0 or "float16" in record.compute_dtypes:
        return []
    if (wiring is not None and wiring.disabled) or (start is not None and (start.zero_a or start.zero_scaling)):
        return []
    if not empty.micro_losses or not all(map(math.isfinite, empty.micro_losses)):
        return []
    loss = empty.micro_losses[0]
    return [decisive(f"at step {empty.step} the loss is {loss:.4g}, and every gradient is missing or exactly 0")]


def _other_update(case: Case) -> list[Clue]:
    """A step that another optimizer of the class takes otherwise, also on float32 copies, or that Adam cannot take."""
    if not case.finite:
        return []
    other = case.failed(update_repeats.Reason.OTHER)
    if other or case.half_trainables:
        return [decisive(f) for f in other]
    apart, far = case.failed(update_lower_bound.Reason.APART), case.failed(update_upper_bound.Reason.TOO_FAR)
    return [decisive(f) for f in [*apart, *far][:1]]


COURSE: tuple[Mechanism, ...] = (
    Mechanism(
        "learning_rate_zero",
        "the schedule gives no learning rate, as a warm-up longer than the run does",
        "shorten the warm-up, or train more steps",
        _no_learning_rate,
    ),
    Mechanism(
        "learning_rate_not_finite",
        "the learning rate is NaN or infinite, and its step writes that into every weight",
        "look at the schedule's function, for 0/0 at the first or the last step, and at what writes to param_groups",
        _rate_not_finite,
    ),
    Mechanism(
        "parameter_group_without_rate",
        "a part of the adapter is in a parameter group whose learning rate is 0, and never moves",
        "give every group of the optimizer a rate; a multiplier of 0 freezes its layers",
        _group_without_rate,
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
        "schedule_too_slow",
        "the schedule is stepped less than once per optimizer step, and the learning rate stays high too long",
        "step the scheduler after each step of the optimizer",
        _too_slow,
    ),
    Mechanism(
        "schedule_does_not_move",
        "the rate stays where the schedule begins: nothing steps the schedule, or it is bound to another optimizer",
        "make the schedule from the optimizer that trains, after the last time that one is replaced, and step it",
        _does_not_move,
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
        "backward gives a gradient that is not finite, and clipping by a norm that it makes infinite spoils all others",
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
        "gradients_below_eps",
        "the gradients are smaller than Adam's eps, which then divides them in the place of their own size",
        "look for what makes the gradients so small (a loss divided too often, a scale), or set a smaller adam_epsilon",
        _below_eps,
    ),
    Mechanism(
        "log_laundered",
        "the log, or the optimizer, was given finite numbers in the place of NaN",
        "set logging_nan_inf_filter=False, and take nan_to_num and the like out of loss and gradients",
        _laundered,
    ),
    Mechanism(
        "clipped_before_unscaling",
        "gradients are clipped while the loss scale is still on them, so that next to nothing is left of them",
        "call scaler.unscale_(optimizer), or accelerator.clip_grad_norm_, which does it, before clipping",
        _clipped_before_unscaling,
    ),
    Mechanism(
        "clipping_left_out",
        "max_grad_norm is set, and the optimizer is given gradients that nothing has clipped",
        "look for an override of accelerator.clip_grad_norm_ or of the training loop",
        _clipping_left_out,
    ),
    Mechanism(
        "clipped_at_another_norm",
        "the gradients are clipped at another norm than max_grad_norm",
        "look for a second clipping, or one with a number of its own, beside max_grad_norm",
        _clipped_elsewhere,
    ),
    Mechanism(
        "gradients_altered",
        "the optimizer is given other gradients than the backward pass made and the Trainer clips",
        "look for what scales, clips, replaces or cleans gradients between backward and the optimizer, as callbacks do",
        _altered,
    ),
    Mechanism(
        "loss_changed_on_the_way",
        "the loss that is trained on is the model's own, or its cross-entropy, changed by a rule in compute_loss",
        "look at overrides of compute_loss, for a division by the accumulation that the Trainer does too, or a sign",
        shown_by(*_CHANGED, loss_counts_once.Reason.MULTIPLIED),
    ),
    Mechanism(
        "factor_gradient_altered",
        "the gradient of one factor of a LoRA layer is not the derivative of what the layer computes",
        "look for hooks on the parameters or on the layer's inner modules, and for a backward pass of own code",
        shown_by(factor_gradients_agree.Reason.APART),
        locates=True,
    ),
    Mechanism(
        "logged_norm_altered",
        "the norm in the log is not that of the gradients",
        "look at overrides of log and clip_grad_norm_; the training itself received the right gradients",
        _logged,
        locates=True,
    ),
    Mechanism(
        "norm_is_not_the_gradients",
        "the norm that is logged is not that of the gradients that backward made: they were changed before clipping",
        "look for what changes gradients between backward and clip_grad_norm_, unscaling included, and at overrides of"
        " log",
        _norm_before_clipping,
        locates=True,
    ),
    Mechanism(
        "logged_loss_altered",
        "the loss in the log is not the one that the training steps returned",
        "look at overrides of log and at what adds losses up; trust the raw loss, not the log",
        _logged_loss,
        locates=True,
    ),
    Mechanism(
        "loss_does_not_reach_the_adapter",
        "the loss is finite and gives the adapter no gradient: it is constant, clamped, detached, or hooks erase it",
        "follow loss.grad_fn back to the adapter: detach, item, clamp, no_grad, and hooks that return zeros",
        _no_gradient_at_all,
        locates=True,
    ),
    Mechanism(
        "adapted_layer_never_called",
        "an adapter sits on a layer that no token passes through: its weight is read past it, or no row needs it",
        "leave the layer out of target_modules; or call it, where a fused loss takes lm_head.weight; or train on rows"
        " that need it, such as images for a vision tower",
        shown_by(adapter_reached.Reason.UNREACHED),
    ),
    Mechanism(
        "gradient_does_not_reach_a_part",
        "backward reaches a part of the adapter only: the other layers are bypassed, detached, or a hook erases theirs",
        "look at the forward pass of the layers that the finding names: detach, no_grad, weights that are read past the"
        " adapter, re-entrant checkpointing without inputs that need gradients",
        _gradient_stops,
        locates=True,
    ),
    Mechanism(
        "backward_not_finite",
        "the backward pass makes NaN or infinity of a finite loss and finite weights",
        "run the step under torch.autograd.detect_anomaly; look at norms, divisions, roots and custom backward passes",
        _backward_not_finite,
        locates=True,
    ),
    Mechanism(
        "update_not_finite",
        "the optimizer's step makes NaN or infinity of finite gradients, or something does so right after it",
        "look at the optimizer's eps and states, at hooks on its step, and at callbacks on_step_end",
        _update_not_finite,
        locates=True,
    ),
    Mechanism(
        "step_leaves_a_part_unmoved",
        "the optimizer's step leaves a part of the adapter as it was, though it has a gradient and there is a rate",
        "look at the optimizer's parameter groups and at what wraps its step, for the tensors that the finding names",
        _part_not_stepped,
        locates=True,
    ),
    Mechanism(
        "elements_never_move",
        "a part of a tensor's elements never moves: their gradients are erased on the way, or their updates are",
        "look for masks and hooks on the gradients, the update or the weights of the tensor that the finding names",
        _elements_left_out,
        locates=True,
    ),
    Mechanism(
        "optimizer_leaves_out_steps",
        "some steps of the optimizer change nothing, though they have gradients and a rate",
        "look at what wraps optimizer.step, and at conditions under which it returns early",
        _steps_left_out,
        locates=True,
    ),
    Mechanism(
        "update_is_not_the_optimizers",
        "within a step the weights move otherwise than the optimizer's settings and its gradients move them",
        "look at what wraps optimizer.step, at hooks on it, and at a decay, noise or scale of its own",
        _other_update,
        locates=True,
    ),
    Mechanism(
        "rate_set_beside_the_schedule",
        "the learning rate of a step is not the schedule's: something else sets it",
        "look for callbacks and loops that write to the optimizer's param_groups",
        _rate_from_elsewhere,
        locates=True,
    ),
)
"""Causes in the course of the training; of two that are worth the same, the earlier goes first."""
