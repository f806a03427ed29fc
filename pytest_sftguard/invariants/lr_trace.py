"""B10: each step used the learning rate that the schedule has for it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from pytest_sftguard import verdicts
from pytest_sftguard.records import RunRecord, ScheduleRecord, StepRecord
from pytest_sftguard.verdicts import Finding, General, Invariant

_USED = "step {step} used the learning rate {observed:g}"
_DUE = "; by {schedule} it is {limit:g} at effective step {due}[[ after {skips:# step} that the loss scaler skipped]]"


class Reason(verdicts.Reason):
    """How a learning rate is not the schedule's, or why that cannot be told."""

    NOT_SEEN = "no learning rate was seen at step {step}"
    NO_SCHEDULE = "no schedule was seen"
    SHORT_SCHEDULE = "the schedule was computed for {computed} of {steps:# step} only"
    ZERO = "the learning rate was 0 at {observed} of {steps:# step} (the first to count: step {step})"
    NOT_POSITIVE = "the learning rate was not positive at {observed} of {steps:# step} ({rate:g} at step {step})"
    NOT_FINITE = _USED + _DUE
    ELSEWHERE = _USED + ", which is that of effective step {place}" + _DUE
    OFF_SCHEDULE = _USED + ", which is none of the schedule's" + _DUE


@dataclass(frozen=True, kw_only=True)
class LrTrace(Invariant):
    """The learning rate of the k-th effective step is the schedule's k-th, and positive on all steps but one.

    A step that the loss scaler skipped is no effective one. Where the optimizer is fused the Trainer's schedule runs on
    at skipped steps (accelerate#4242); that is allowed for as many as a healthy scaler skips. A learning rate that
    a callback sets beside the schedule is a failure: the schedule does not say it, and nobody else can.
    """

    rtol: float = 1e-6
    """Largest relative difference: the same function of the same numbers, which a tensor may hold in float32."""
    max_ahead_early: int = 3
    """Steps that the schedule may be ahead of the effective steps, by skips among the first ten."""
    max_ahead_late: int = 1
    """As many more for each ten steps after that."""
    max_zero_steps: int = 1
    """Steps that may have the learning rate 0: a linear warm-up begins there."""

    code: ClassVar[str] = "B10"
    asks_for: ClassVar[tuple[str, ...]] = ("schedule",)

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Compare step by step, then count the zeros."""
        schedule, unseen = record.schedule, [s.step for s in record.steps if s.learning_rate is None]
        if not record.steps:
            yield self.not_evaluated(General.NO_STEP)
            return
        if unseen:
            yield self.not_evaluated(Reason.NOT_SEEN, step=unseen[0])
            return
        yield from self._zeros(record.taken_steps)
        if schedule is None:
            yield self.not_evaluated(Reason.NO_SCHEDULE)
        elif schedule.unknown:
            yield self.not_evaluated(General.INAPPLICABLE, why=schedule.unknown, required=False)
        elif len(schedule.rates) < len(record.steps):
            yield self.not_evaluated(Reason.SHORT_SCHEDULE, computed=len(schedule.rates), steps=len(record.steps))
        else:
            yield from self._compared(record, schedule)

    def _zeros(self, taken: list[StepRecord]) -> Iterator[Finding]:
        zero = [s for s in taken if not (s.learning_rate is not None and s.learning_rate > 0)]
        if not len(zero) <= self.max_zero_steps:
            first, limit = zero[self.max_zero_steps], self.max_zero_steps
            reason = Reason.ZERO if first.learning_rate == 0 else Reason.NOT_POSITIVE
            seen = {"rate": first.learning_rate, "steps": len(taken)}
            yield self.failed(reason, step=first.step, observed=len(zero), limit=limit, **seen)

    def _compared(self, record: RunRecord, schedule: ScheduleRecord) -> Iterator[Finding]:
        skips = 0
        for i, s in enumerate(record.steps):
            due = i - skips
            ahead = min(skips, self._budget(s.step))
            if any(self._same(s.learning_rate, rate) for rate in schedule.rates[due : due + ahead + 1]):
                skips += s.scale_fell and not s.changed
                continue
            place = next((k for k, r in enumerate(schedule.rates, 1) if self._same(s.learning_rate, r)), None)
            seen: dict[str, Any] = {"place": place, "due": due + 1, "skips": skips or None, "schedule": schedule.name}
            finite = s.learning_rate is not None and math.isfinite(s.learning_rate)
            reason = Reason.ELSEWHERE if place else Reason.OFF_SCHEDULE if finite else Reason.NOT_FINITE
            yield self.failed(reason, step=s.step, observed=s.learning_rate, limit=schedule.rates[due], **seen)
            return

    def _budget(self, step: int) -> int:
        return self.max_ahead_early + self.max_ahead_late * max(0, -(-(step - 10) // 10))

    def _same(self, used: float | None, due: float) -> bool:
        return used is not None and abs(used - due) <= self.rtol * abs(due)
