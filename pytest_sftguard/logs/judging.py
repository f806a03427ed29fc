"""Judging: what the series of a log show, what they cannot show, and what to do next.

A log is no evidence that a training works: nothing here says so of one.
"""

from __future__ import annotations

import enum
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median

from pytest_sftguard.logs.series import Entry, Log

Points = Sequence[Entry]
"""The entries about the steps of one training."""
Test = Callable[[Entry], bool]

MOST_HALVINGS = 16
"""A loss scale of 65536, fp16's usual start, is 1 after so many skipped steps; more are no search for a scale."""
AT_THE_END = 3
"""Entries in a row without a finite norm at the end. A search in the middle of a run ends after one or two."""
UNEXPLAINED_SHARE = 0.1
"""Share of skipped steps that no search for the loss scale explains: the scale grows once in 2000 steps."""
LEARNED = 0.1
"""A loss below it has been learned: its next step may be 0.0 in four decimals. Labels do not vanish so smoothly."""
TINY = 1e-3
"""A loss below it has gradients that a log of four decimals shows as 0."""
VANISHED = 1e-8
"""A norm this far below an earlier one is zero but for rounding: float32 resolves 6e-8."""
EXACT_DIGITS = 6
"""Digits from which two equal numbers are no coincidence of rounding: the Trainer of transformers 4 prints four."""
RISE = 1.0
"""Nats between the lowest level of a loss and a plateau that is no noise."""
ENDS_ABOVE = 1.2
"""Share of its first level above which a loss that is nowhere higher has risen; harder rows may explain twice it."""
SPIKE = 3.0
"""Times the highest of the first five losses that no batch explains: the noise of batches is in those five."""


class Weight(enum.IntEnum):
    """How much a statement weighs."""

    ALARM = 0
    """The training is broken."""
    DOUBT = 1
    """The log allows more than one reading, and one of them is a failure."""
    NOTE = 2
    """It has an ordinary reason."""


@dataclass(frozen=True, kw_only=True)
class Statement:
    """One thing that a log shows."""

    code: str
    """Short name of what is shown."""
    weight: Weight
    """How much it weighs."""
    where: str
    """The steps at which it shows, in words. Empty: it is about the whole log."""
    text: str
    """What is shown, with its numbers."""
    next: str
    """What to do next."""
    first_step: int | None = None
    """The first of the steps. None: the log does not number them."""
    last_step: int | None = None
    """The last of the steps."""


def explain(log: Log) -> tuple[Statement, ...]:
    """What a log shows, the worst first, and of two that weigh the same the earlier."""
    found = _merged(s for rule in LOG_RULES for s in rule(log))
    for points in log.trainings:
        found += _merged(s for rule in TRAINING_RULES for s in rule(points))
    return tuple(sorted(found, key=lambda s: (s.weight, math.inf if s.first_step is None else s.first_step)))


def cannot_show(log: Log) -> Iterator[str]:
    """What this log leaves open, each as a sentence."""
    points = [p for points in log.trainings for p in points]
    if points and not any(p.grad_norm is not None for p in points):
        yield "Whether gradients arrive, and are finite: it has no grad_norm."
    gaps = [b.step - a.step for a, b in pairwise(points) if a.step is not None and b.step is not None]
    if gaps and max(gaps) > 1:
        yield f"The steps between two entries ({max(gaps)} apart): a norm is that of the logged step alone."
    if any(p.rounded for p in points):
        yield "Digits beyond the fourth: the Trainer printed its numbers rounded."
    if log.global_step is not None and log.max_steps is not None and log.global_step < log.max_steps:
        yield f"The steps after {log.global_step} of {log.max_steps}, where it ends."
    yield (
        "A NaN that the Trainer replaced: by default (logging_nan_inf_filter) a loss that is not finite enters the "
        "mean as the mean so far, or as 0, and newer versions leave it out of eval_loss."
    )
    yield "Whether a norm was clipped: the Trainer logs it before clipping, and max_grad_norm is not in the log."
    yield (
        "Whether a step changed the weights, in which precision it was computed, which tokens had labels, and what "
        "the saved adapter answers."
    )


# Rules on the steps of one training


def non_finite_losses(points: Points) -> Iterator[Statement]:
    """A loss in the log that is NaN or infinite: nothing replaced it."""
    bad = [p for p in points if p.loss is not None and not math.isfinite(p.loss)]
    if bad:
        yield _statement(
            "loss_not_finite",
            Weight.ALARM,
            bad,
            f"The loss is {_values(bad, 'loss')} in {_share(bad, points)}.",
            "Find the first module whose output is not finite; look at the batch of the first of these steps, and at "
            "the precision.",
        )


def non_finite_norms(points: Points) -> Iterator[Statement]:
    """Norms that are NaN or infinite: a laundered loss, an end of training, or skipped steps."""
    skipped: list[Entry] = []
    of_policy = _zero_is_a_value(points)
    for begin, end in _runs(points, lambda p: p.grad_norm is not None and not math.isfinite(p.grad_norm)):
        run = points[begin:end]
        recovered = any(p.grad_norm is not None for p in points[end : end + 1])
        # a loss that was already 0.000 with finite norms before the run is not 0 because of it
        learned = recovered and any(p.loss == 0 and _finite(p.grad_norm) for p in points[max(begin - 3, 0) : begin])
        zero = [p for p in run if p.loss == 0]
        if zero and not learned and not of_policy:
            yield _laundered(zero, run, points)
        elif any(p.loss is not None and not math.isfinite(p.loss) for p in run):
            # told by non_finite_losses
            continue
        elif len(run) > MOST_HALVINGS or (not recovered and _lasting(run, points)):
            yield _statement(
                "norms_stay_non_finite",
                Weight.ALARM,
                run,
                f"grad_norm is {_values(run, 'grad_norm')} in {len(run)} entries in a row"
                f"{'' if recovered else ', to the end'}. A loss scaler skips such steps, so that nothing is learned; "
                "without one the weights are NaN.",
                "Train the same steps in bf16 or float32; if the norms are finite there, fp16 overflows.",
            )
        elif not recovered:
            yield _statement(
                "norm_not_finite_at_the_end",
                Weight.DOUBT,
                run,
                f"grad_norm is {_values(run, 'grad_norm')}, and the log ends before a finite one follows. One step "
                "that the loss scaler of fp16 skipped looks like this, and so does the first step of a failure.",
                "Log some steps more with logging_steps=1.",
            )
        else:
            skipped += run
    if skipped:
        yield _skips(skipped, points)


def _laundered(zero: Points, run: Points, points: Points) -> Statement:
    first = "" if run[0] is zero[0] else f" grad_norm is not finite from {_where(run[:1])} on."
    return _statement(
        "laundered_loss",
        Weight.ALARM,
        zero,
        f"The loss is 0.0 beside a grad_norm of {_values(zero, 'grad_norm')} in {_share(zero, points)}.{first} "
        "This 0.0 is no loss: the Trainer (logging_nan_inf_filter) writes it where the loss was NaN or infinite.",
        "Set logging_nan_inf_filter=False to see it, and look at the step before the first of these: its update made "
        "the weights NaN, or the forward pass overflows.",
    )


def _lasting(run: Points, points: Points) -> bool:
    return len(run) >= AT_THE_END or 1 < len(run) == len(points)


def _skips(skipped: list[Entry], points: Points) -> Statement:
    """Steps with a non-finite norm and a loss of their own, after which finite norms follow."""
    schedule = {
        None: "the log does not show whether the learning rate stood still in them.",
        False: "the learning rate stood still in them: they were skipped.",
        True: "the learning rate moved all the same, as it does with a fused optimizer (accelerate#4242).",
    }[_schedule_moved(skipped, points)]
    # the first search takes as many steps as it needs
    searched = {p.place for p in points[:MOST_HALVINGS]}
    late = [p for p in skipped if p.place not in searched]
    many = len(late) >= AT_THE_END and len(late) > UNEXPLAINED_SHARE * len(points)
    return _statement(
        "too_many_skips" if many else "skipped_steps",
        Weight.DOUBT if many else Weight.NOTE,
        skipped,
        f"grad_norm is {_values(skipped, 'grad_norm')} in {_share(skipped, points)}. The loss is finite there, and "
        f"finite norms follow: no update made the weights NaN. fp16 finds its loss scale by skipping such steps; "
        f"{schedule}" + (" The search does not explain so many." if many else ""),
        "Compare with the same steps in bf16 or float32."
        if many
        else "Nothing, if this is fp16. No other precision skips steps: look at the gradients of the first one.",
    )


def _schedule_moved(skipped: list[Entry], points: Points) -> bool | None:
    """Whether the learning rate moved in the skipped steps; None where the log does not show it.

    transformers logs the rate before the step, versions before 4.47 the one after it: the rate stood still if it did
    by either reading.
    """
    rates = [p.learning_rate for p in points]
    places = {p.place for p in skipped}
    at = [i for i, p in enumerate(points) if p.place in places]
    apart = any(
        b.step is not None and a.step is not None and b.step - a.step != 1
        for i in at
        for a, b in pairwise(points[max(i - 1, 0) : i + 2])
    )
    # a constant rate tells nothing, nor does one that seems to stand still because it was printed rounded
    standing = sum(a == b for a, b in pairwise(rates))
    if apart or None in rates or 2 * standing > len(rates):
        return None
    before = [rates[i - 1] == rates[i] for i in at if i]
    if all(rates[i + 1] == rates[i] for i in at) or (before and all(before)):
        return False
    return True if before else None


def zero_norms(points: Points) -> Iterator[Statement]:
    """Norms that are exactly zero: labels that are masked, a loss without a gradient, an adapter that is dead."""
    peak = 0.0
    silent = set()
    for p in points:
        norm = p.grad_norm
        if norm is not None and math.isfinite(norm):
            # a tiny norm beside a tiny loss is a task that was learned
            dying = p.loss is not None and abs(p.loss) >= LEARNED and norm <= VANISHED * peak
            silent |= {p.place} if norm == 0 or dying else set()
            peak = max(peak, norm)
    of_policy = _zero_is_a_value(points)
    for begin, end in _runs(points, lambda p: p.place in silent):
        yield _zero_norm(points[begin:end], points[begin - 1] if begin else None, points, of_policy)


def _zero_norm(run: Points, before: Entry | None, points: Points, of_policy: bool) -> Statement:
    to_the_end = run[-1] is points[-1]
    lasts = len(run) >= AT_THE_END or (to_the_end and len(run) > 1)
    if any(map(_has_rewards, run)) and not any(map(_has_advantages, run)):
        return _statement(
            "no_advantage",
            Weight.ALARM
            if lasts and len(run) == len(points)
            else Weight.DOUBT
            if lasts and to_the_end
            else Weight.NOTE,
            run,
            f"grad_norm is 0 in {_share(run, points)}. Where all answers to a prompt have the same reward there is "
            "no advantage, and no gradient.",
            "Look at the rewards: a function that rates every answer alike, or a task that is solved or hopeless.",
        )
    zero_loss = all(p.loss == 0 for p in run) and not of_policy
    tiny = all(p.loss is not None and abs(p.loss) < TINY for p in run)
    if tiny and not of_policy and before is not None and before.loss is not None and abs(before.loss) < LEARNED:
        return _statement(
            "saturated_loss",
            Weight.DOUBT,
            run,
            f"The loss is {_values(run, 'loss')} and grad_norm 0 in {_share(run, points)}, after a loss of "
            f"{_number(before.loss)}: the task is learned until float32 resolves no error, or the labels end here.",
            "Decode the labels of a batch of these steps, and evaluate on rows that were not trained on.",
        )
    if zero_loss:
        return _statement(
            "no_labels",
            Weight.ALARM if lasts or len(run) == len(points) else Weight.DOUBT,
            run,
            f"Loss and grad_norm are both exactly 0 in {_share(run, points)}: every label is masked (-100), or the "
            "loss has no gradient.",
            "Decode the labels of one batch: look for a response template that is never found, a prompt mask over "
            "everything, and rows truncated before their answer."
            + (" Where the loss was not 0 before, look for nan_to_num too." if before else ""),
        )
    losses = {p.loss for p in run if p.loss is not None}
    course = f"stands still at {_number(run[0].loss)}" if len(losses) == 1 else "moves with the batches at most"
    return _statement(
        "dead_adapter",
        Weight.ALARM if lasts or len(run) == len(points) else Weight.DOUBT,
        run,
        f"grad_norm is {_values(run, 'grad_norm')} in {_share(run, points)}, and the loss {course}: a dead "
        "adapter, no gradient reaches what is trained"
        + (f" from {_where(run[:1])} on." if before and to_the_end else "."),
        "Look at which parameters have requires_grad, at enable_input_require_grads with gradient checkpointing, at "
        "detached or no_grad code, and at gradients that underflow in fp16.",
    )


def zero_losses(points: Points) -> Iterator[Statement]:
    """Losses of exactly 0 whose norm is not in the log, or does not fit them."""
    if _zero_is_a_value(points):
        return
    for begin, end in _runs(points, lambda p: p.loss == 0 and (p.grad_norm is None or _finite(p.grad_norm, 0))):
        # enough to tell what came before, in a log of any length
        run, before = points[begin:end], points[max(begin - 50, 0) : begin]
        previous = next((p.loss for p in reversed(before) if p.loss is not None), None)
        sudden = previous is None or not abs(previous) < LEARNED
        unseen = all(p.grad_norm is None for p in run)
        if sudden and unseen:
            yield _statement(
                "zero_loss",
                Weight.ALARM if len(run) > 1 else Weight.DOUBT,
                run,
                f"The loss is exactly 0 in {_share(run, points)}"
                f"{'' if previous is None else f', after {_number(previous)}'}, and the log has no grad_norm for it. "
                "Either the Trainer replaced a NaN (logging_nan_inf_filter), or no label is left.",
                "Set logging_nan_inf_filter=False and log grad_norm; decode the labels of one batch.",
            )
        elif sudden and not _norms_fell(run, before):
            # a loss that was never above 0 may be one that is 0 on average
            lasts = len(run) >= AT_THE_END or (run[-1] is points[-1] and len(run) > 1)
            yield _statement(
                "zero_loss_with_gradient",
                Weight.ALARM if previous is not None and lasts else Weight.DOUBT,
                run,
                f"The loss is exactly 0 in {_share(run, points)}, and grad_norm is {_values(run, 'grad_norm')}: a "
                "task that was learned has small norms, and its loss falls to 0 by and by.",
                "Set logging_nan_inf_filter=False, and compare with the loss that compute_loss returns.",
            )


def _norms_fell(run: Points, before: Points) -> bool:
    """Whether the norms became small with the loss, as they do where a task was learned between two entries."""
    earlier = [p.grad_norm for p in before if p.grad_norm is not None and math.isfinite(p.grad_norm)]
    return bool(earlier) and max(p.grad_norm or 0.0 for p in run) < LEARNED * median(earlier)


def frozen_losses(points: Points) -> Iterator[Statement]:
    """A loss that stays the same to its last digit although the learning rate is not zero."""
    for begin, end in _same(points):
        run = points[begin:end]
        norms = [p.grad_norm for p in run]
        if any(norm is not None and (norm == 0 or not math.isfinite(norm)) for norm in norms):
            continue
        if all(p.learning_rate == 0 for p in run):
            continue
        # each process of a distributed training may print the same line
        moments = {(p.step, p.values.get("epoch"), p.learning_rate) for p in run} - {(None, None, None)}
        length = len(moments) or len(run)
        if length < 3:
            continue
        exact = _digits(run[0].loss) >= EXACT_DIGITS
        norm_too = norms[0] is not None and len(set(norms)) == 1
        ends = run[-1] is points[-1]
        # four digits also agree while the rate warms up, and one batch that is repeated converges to them
        long = length >= 8
        certain = (norms[0] is None and exact) or (norm_too and (long or _digits(norms[0]) >= EXACT_DIGITS))
        if exact or norm_too or long:
            yield _statement(
                "frozen_loss",
                Weight.ALARM if certain and ends else Weight.DOUBT,
                run,
                f"The loss is {_number(run[0].loss)} to its last digit in {_share(run, points)}"
                + (f", and so is grad_norm ({_number(norms[0])})" if norm_too else "")
                + (": the weights do not move." if certain else ": the weights hardly move, or not at all."),
                "See whether the optimizer owns the trainable parameters, and compare the adapter before and after a "
                "step.",
            )


def learning_rates(points: Points) -> Iterator[Statement]:
    """A learning rate of zero, below zero, or not finite."""
    rates = [(p, p.learning_rate) for p in points if p.learning_rate is not None]
    bad = [p for p, rate in rates if not rate >= 0 or math.isinf(rate)]
    if bad:
        yield _statement(
            "learning_rate_unusable",
            Weight.ALARM,
            bad,
            f"The learning rate is {_values(bad, 'learning_rate')}.",
            "Look at learning_rate and at the scheduler.",
        )
    zeros = [p for p, rate in rates if rate == 0]
    tail = next((k for k, (_, rate) in enumerate(reversed(rates)) if rate != 0), len(rates))
    if len(rates) > 1 and tail == len(rates):
        losses = _losses(points)
        quarter = max(len(losses) // 4, 1)
        falls = len(losses) >= 8 and median(losses[-quarter:]) < 0.8 * median(losses[:quarter])
        yield _statement(
            "learning_rate_zero",
            Weight.DOUBT if falls else Weight.ALARM,
            zeros,
            f"The learning rate is 0 in all {len(rates)} entries"
            + (", and yet the loss falls: it may be that of the first group of parameters alone." if falls else ".")
            + " DeepSpeed logs 0 as long as every step is skipped.",
            "Look at learning_rate, at the scheduler and its warm-up, and at the groups of the optimizer.",
        )
    elif tail > max(AT_THE_END, UNEXPLAINED_SHARE * len(rates)):
        yield _statement(
            "schedule_ended_early",
            Weight.DOUBT,
            [p for p, _ in rates[-tail:]],
            f"The learning rate is 0 in the last {tail} of {len(rates)} entries: the schedule ended before the "
            "training.",
            "Compare the scheduler's number of steps with max_steps; each process and each micro-batch may count.",
        )


def divergence(points: Points) -> Iterator[Statement]:
    """A loss that rises to a plateau, such as that of a uniform guess, or is highest at its end."""
    losses = _losses(points)
    width = max(5, len(losses) // 10)
    if _zero_is_a_value(points) or len(losses) < width + 2:
        return
    tail = losses[-width:]
    level = median(tail)
    # the first loss alone is a level only where no noise of a batch explains it
    levels = [losses[0]] * (level > SPIKE * losses[0]) + [median(losses[i : i + 3]) for i in range(len(losses) - 2)]
    lowest = min(levels)
    if level - lowest < RISE or level < 1.5 * lowest or level < 0.9 * losses[0]:
        return
    start = median(losses[:width])
    # a loss that still rises has no plateau
    flat = max(tail) - min(tail) <= 0.1 * level and tail != sorted(tail)
    guess = f" A uniform guess among {math.exp(level):,.0f} tokens has this loss." if 2 < level < 14 else ""
    earlier = [median(losses[i : i + width]) for i in range(0, len(losses) - 2 * width + 1, width // 2)]
    if flat:
        yield _statement(
            "diverged",
            Weight.ALARM,
            points[list(_runs(points, lambda p: _finite(p.loss, 0.9 * level)))[-1][0] :],
            f"The loss was {_number(lowest)}, rose, and stays near {_number(level)}.{guess} The training diverged.",
            "Lower the learning rate, warm it up, and look at max_grad_norm; evaluate the checkpoint before the rise.",
        )
    elif len(earlier) >= 5 and level > ENDS_ABOVE * start and level >= max(earlier) and min(tail) > start:
        yield _statement(
            "loss_rises",
            Weight.ALARM if min(tail) > 2 * start else Weight.DOUBT,
            [p for p in points if _finite(p.loss)][-width:],
            f"The loss began near {_number(start)} and is highest at its end, near {_number(level)}.",
            "Lower the learning rate, and see whether the rows are sorted by difficulty.",
        )


def spikes(points: Points) -> Iterator[Statement]:
    """A loss far above those that the training began with."""
    losses = _losses(points)
    first = max(losses[:5], default=math.inf)
    if not _zero_is_a_value(points) and max(losses, default=0.0) > SPIKE * first + RISE:
        high = [p for p in points if _finite(p.loss, SPIKE * first + RISE)]
        yield _statement(
            "loss_spikes",
            Weight.DOUBT,
            high,
            f"The loss is up to {_number(max(losses))} in {_share(high, points)}, and at most {_number(first)} in the "
            "first five.",
            "Lower the learning rate and warm it up, and look at the batches of these steps.",
        )


def constant_norms(points: Points) -> Iterator[Statement]:
    """Norms that are all the same although the losses differ: they were logged after clipping."""
    norms = [p.grad_norm for p in points if _finite(p.grad_norm, 0)]
    repeated, count = next(iter(Counter(norms).most_common(1)), (None, 0))
    if count >= 5 and count > 0.5 * len(norms) and len(set(_losses(points))) > count // 2:
        yield _statement(
            "clipped_norms",
            Weight.NOTE,
            [p for p in points if p.grad_norm == repeated],
            f"grad_norm is {_number(repeated)} in {count} of {len(points)} entries while the loss moves: it was logged "
            "after clipping, and does not show how large gradients are.",
            "Log the norm that clip_grad_norm_ returns, which is the one before clipping.",
        )


TRAINING_RULES = (
    non_finite_losses,
    non_finite_norms,
    zero_norms,
    zero_losses,
    frozen_losses,
    learning_rates,
    divergence,
    spikes,
    constant_norms,
)


# Rules on a whole log


def no_evidence(log: Log) -> Iterator[Statement]:
    """A log without an entry about a training step."""
    if log.trainings:
        return
    summary = next((e for e in log.entries if "train_runtime" in e.values or "train_loss" in e.values), None)
    steps = log.global_step if log.global_step is not None else summary.step if summary else None
    if summary and steps == 0:
        yield _statement(
            "no_steps",
            Weight.ALARM,
            [summary],
            "The training ended without an optimizer step.",
            "See whether the dataset has fewer rows than a batch (dataloader_drop_last).",
        )
        return
    each = "" if log.logging_steps is None else f" (logging_steps={log.logging_steps:g})"
    total = "" if steps is None else f" of {steps} steps"
    yield Statement(
        code="no_evidence",
        weight=Weight.DOUBT,
        where="",
        text=f"No entry is about a training step{total}{each}. A log without entries is no evidence, and the mean "
        "in train_loss hides a NaN.",
        next="Train again with logging_steps=1.",
    )


def summaries(log: Log) -> Iterator[Statement]:
    """A mean over the training that is not finite, or exactly 0."""
    for entry in log.entries:
        mean = entry.values.get("train_loss")
        if mean is None:
            continue
        zero = mean == 0 and entry.step != 0 and not any(map(_zero_is_a_value, [*log.trainings, log.entries]))
        if zero or not math.isfinite(mean):
            yield _statement(
                "train_loss",
                Weight.ALARM,
                [entry],
                f"train_loss, the mean over all steps, is {_number(mean)}"
                + (": each loss was 0, or NaN and replaced." if zero else "."),
                "Train again with logging_steps=1 and logging_nan_inf_filter=False.",
            )


def evaluations(log: Log) -> Iterator[Statement]:
    """Evaluations whose metrics are not finite, or whose loss never changes."""
    keys = dict.fromkeys(k for e in log.entries for k in e.values if k.startswith("eval_"))
    for key in keys:
        entries = [e for e in log.entries if key in e.values]
        bad = [e for e in entries if not math.isfinite(e.values[key])]
        if bad:
            # TRL's statistics by group are NaN where a group is empty, and a spread where it has one member
            ordinary = "/" in key or key.endswith("std")
            yield _statement(
                "evaluation_not_finite",
                Weight.DOUBT if ordinary else Weight.ALARM,
                bad,
                f"{key} is {_values(bad, key)} in {len(bad)} of {len(entries)} evaluations.",
                "Look for evaluation rows without a label, for rows of padding alone, and at the precision of the "
                "evaluation.",
            )
        if key.endswith("loss"):
            yield from _frozen_evaluations(key, entries)


def _frozen_evaluations(key: str, entries: list[Entry]) -> Iterator[Statement]:
    """Evaluations of three steps that agree in every digit; two do after load_best_model_at_end."""
    for begin, end in _equal(entries, lambda e: e.values[key]):
        run = entries[begin:end]
        number = run[0].values[key]
        if len({e.step or e.place for e in run}) >= 3 and _digits(number) >= EXACT_DIGITS and math.isfinite(number):
            yield _statement(
                "frozen_evaluation",
                Weight.ALARM,
                run,
                f"{key} is {number!r} to its last digit in {len(run)} evaluations in a row: what is evaluated does "
                "not change.",
                "See whether the adapter is active in the evaluation, and whether a step changes it.",
            )


def others(log: Log) -> Iterator[Statement]:
    """Any other number that is not finite, and nulls where numbers belong."""
    told = {"loss", "grad_norm", "train_loss"}
    names = dict.fromkeys(k for e in log.entries for k in e.values if k not in told and not k.startswith("eval_"))
    for name in names:
        bad = [e for e in log.entries if not math.isfinite(e.values.get(name, 0.0))]
        if name == "learning_rate":
            # the entries about steps are told by learning_rates
            bad = [e for e in bad if not e.is_training]
        if bad:
            yield _statement(
                "metric_not_finite",
                Weight.DOUBT,
                bad,
                f"{name} is {_values(bad, name)} in {len(bad)} of {len(log.entries)} entries.",
                "Find out what it is computed from; a mean over an empty group is NaN by itself.",
            )
    for name in ("loss", "grad_norm", "learning_rate"):
        bad = [e for e in log.entries if name in e.empty]
        if bad:
            yield _statement(
                "null",
                Weight.DOUBT,
                bad,
                f"{name} is null in {len(bad)} of {len(log.entries)} entries: some writers put null for NaN.",
                "Look at a log that the Trainer itself wrote, such as trainer_state.json.",
            )


def crashes(log: Log) -> Iterator[Statement]:
    """A traceback among the lines."""
    if log.crash:
        yield Statement(
            code="traceback",
            weight=Weight.DOUBT,
            where="",
            text=f"There is a traceback in it, which ends with: {log.crash}",
            next="See whether the training went on after it.",
        )


LOG_RULES = (no_evidence, summaries, evaluations, others, crashes)


# What the rules share


def _merged(statements: Iterable[Statement]) -> list[Statement]:
    """The first of each code and weight, which tells how often the same shows again."""
    groups: dict[tuple[str, Weight], list[Statement]] = {}
    for statement in statements:
        groups.setdefault((statement.code, statement.weight), []).append(statement)
    return [
        group[0]
        if len(group) == 1
        else replace(
            group[0],
            text=f"{group[0].text} The same shows {len(group) - 1} times more, the last at {group[-1].where}.",
            last_step=group[-1].last_step,
        )
        for group in groups.values()
    ]


def _statement(code: str, weight: Weight, at: Points, text: str, next_: str) -> Statement:
    return Statement(
        code=code,
        weight=weight,
        where=_where(at),
        text=text,
        next=next_,
        first_step=at[0].step,
        last_step=at[-1].step,
    )


def _where(at: Points) -> str:
    """The steps of some entries, or their places where the log does not number its steps."""
    noun = "log line" if any(p.step is None for p in at) else "step"
    numbers = [p.place if noun == "log line" else p.step for p in at]
    if len(numbers) == 1:
        return f"{noun} {numbers[0]}"
    if len(numbers) <= 4:
        return f"{noun}s {', '.join(map(str, numbers))}"
    return f"{noun}s {numbers[0]} to {numbers[-1]}"


def _share(some: Points, points: Points) -> str:
    return f"{len(some)} of {len(points)} entries" if len(points) > 1 else "the only entry"


def _values(at: Points, key: str) -> str:
    """The different values of some entries: the smallest and the largest, NaN and infinity by name."""
    numbers = [p.values[key] for p in at if key in p.values]
    finite = sorted({n for n in numbers if math.isfinite(n)})
    texts = (
        [_number(finite[0])]
        if len(finite) == 1
        else [f"{_number(finite[0])} to {_number(finite[-1])}"]
        if finite
        else []
    )
    return " or ".join([*texts, *sorted({_number(n) for n in numbers if not math.isfinite(n)})])


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"


def _finite(value: float | None, above: float = -math.inf) -> bool:
    return value is not None and math.isfinite(value) and value > above


def _losses(points: Points) -> list[float]:
    return [p.loss for p in points if p.loss is not None and math.isfinite(p.loss)]


def _zero_is_a_value(points: Points) -> bool:
    """Whether the loss is one of a policy, which is 0 on average: it is negative somewhere, or there are rewards."""
    return any(_has_rewards(p) or (p.loss or 0.0) < 0 for p in points)


def _has_rewards(point: Entry) -> bool:
    return bool({"reward", "reward_std"} & point.values.keys())


def _has_advantages(point: Entry) -> bool:
    """Whether the answers to some prompt had different rewards."""
    without = point.values.get("frac_reward_zero_std")
    return point.values.get("reward_std", 0.0) > 0 if without is None else without < 1


def _digits(value: float | None) -> int:
    """Significant digits of a number as it stands in the log."""
    text = repr(value).partition("e")[0]
    return len(text.replace(".", "").replace("-", "").strip("0"))


def _runs(points: Points, holds: Test) -> Iterator[tuple[int, int]]:
    """Begin and end of the longest rows of entries for which `holds` is true."""
    begin = None
    for i, point in enumerate(points):
        if holds(point):
            begin = i if begin is None else begin
        elif begin is not None:
            yield begin, i
            begin = None
    if begin is not None:
        yield begin, len(points)


def _equal(entries: Points, key: Callable[[Entry], float | None]) -> Iterator[tuple[int, int]]:
    """Begin and end of the rows of three or more entries with the same value."""
    begin = 0
    for i in range(1, len(entries) + 1):
        if i == len(entries) or key(entries[i]) != key(entries[begin]):
            if i - begin >= 3 and key(entries[begin]) is not None:
                yield begin, i
            begin = i


def _same(points: Points) -> Iterator[tuple[int, int]]:
    """The rows of three or more losses that agree, and are not so small that rounding makes them agree."""
    for begin, end in _equal(points, lambda p: p.loss):
        if abs(points[begin].loss or 0.0) >= LEARNED:
            yield begin, end
