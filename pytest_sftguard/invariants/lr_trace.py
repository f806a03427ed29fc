"""B10: each step used the learning rate that the schedule has for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard.records import RunRecord, ScheduleRecord, StepRecord
from pytest_sftguard.verdicts import Finding, Invariant


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
        taken = [s for s in record.steps if s.effect != "skipped_by_scaler"]
        unseen = [s.step for s in record.steps if s.learning_rate is None]
        if not record.steps or unseen:
            yield self.not_evaluated(f"no learning rate was seen{f' at step {unseen[0]}' if unseen else ''}")
            return
        yield from self._zeros(taken)
        if record.schedule is None:
            yield self.not_evaluated("no schedule was seen")
        elif record.schedule.unknown:
            yield self.not_evaluated(record.schedule.unknown, required=False)
        elif len(record.schedule.rates) < len(record.steps):
            yield self.not_evaluated(f"the schedule was computed for {len(record.schedule.rates)} steps alone")
        else:
            yield from self._compared(record, record.schedule)

    def _zeros(self, taken: list[StepRecord]) -> Iterator[Finding]:
        zero = [s for s in taken if not (s.learning_rate is not None and s.learning_rate > 0)]
        if not len(zero) <= self.max_zero_steps:
            first = zero[self.max_zero_steps]
            yield self.failed(
                f"the learning rate is {first.learning_rate} at {len(zero)} of {len(taken)} steps (the first to count:"
                f" step {first.step})",
                step=first.step, observed=len(zero), limit=self.max_zero_steps,
            )  # fmt: skip

    def _compared(self, record: RunRecord, schedule: ScheduleRecord) -> Iterator[Finding]:
        skips = 0
        for i, s in enumerate(record.steps):
            due = i - skips
            ahead = min(skips, self._budget(s.step))
            if any(self._same(s.learning_rate, rate) for rate in schedule.rates[due : due + ahead + 1]):
                skips += s.scale_fell and not s.changed
                continue
            at = next((k for k, r in enumerate(schedule.rates) if self._same(s.learning_rate, r)), None)
            place = "" if at is None else f", which is that of step {at + 1}"
            after = f" after {skips} that the loss scaler skipped" if skips else ""
            yield self.failed(
                f"step {s.step} used the learning rate {s.learning_rate:g}{place}; by {schedule.name} it is"
                f" {schedule.rates[due]:g} at effective step {due + 1}{after}",
                step=s.step, observed=s.learning_rate, limit=schedule.rates[due],
            )  # fmt: skip
            return

    def _budget(self, step: int) -> int:
        return self.max_ahead_early + self.max_ahead_late * max(0, -(-(step - 10) // 10))

    def _same(self, used: float | None, due: float) -> bool:
        return used is not None and abs(used - due) <= self.rtol * abs(due)
