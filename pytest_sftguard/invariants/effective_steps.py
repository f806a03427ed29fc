"""B9: every optimizer step took effect, but for the few that a loss scaler may skip."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard import verdicts
from pytest_sftguard.records import RunRecord
from pytest_sftguard.verdicts import Finding, General, Invariant


class Reason(verdicts.Reason):
    """Why a step counts for nothing."""

    UNMOVED = (
        "{observed} of {steps} steps changed no parameter (first: step {step}, learning rate {learning_rate}, grad_norm"
        " {grad_norm})"
    )
    UNKNOWN = "what step {step} did was not seen"
    SKIPPED_EARLY = "the loss scaler skipped {observed} of the first {steps} steps"
    SKIPPED_LATE = "the loss scaler skipped {observed} of the ten steps from step {start}"
    SKIPPED_ALL = "the loss scaler skipped every step"
    LOSS_SCALE = "the loss scale is {observed:g} at step {step}"
    CHANGED_BETWEEN = (
        "something other than the optimizer changed the adapter by {observed:.3g} after step {step}, which itself"
        " changed it by {update:.3g}"
    )
    STALE_GRADIENTS = (
        "{steps_stale} of {steps} steps began with gradients of an earlier step (first: step {step}, {tensors}):"
        " nothing cleared them"
    )
    UNSUPERVISED = "{steps_empty} of {steps} steps had no supervised token (first: step {step})"


@dataclass(frozen=True, kw_only=True)
class EffectiveSteps(Invariant):
    """Steps are counted by what they changed, and all of them changed something."""

    max_skipped_early: int = 3
    """Steps that the scaler may skip among the first ten: it starts at 65536 and halves until the gradients fit."""
    max_skipped_late: int = 1
    """Steps that it may skip in any ten after that: a scale that the scaler tries to grow overflows now and then."""
    min_loss_scale: float = 1.0
    """Smallest loss scale that still scales anything; below it the overflow is not the scale's."""
    max_idle_warm_up: int = 1
    """Steps with learning rate 0 at the start, skipped ones not counted: a linear warm-up begins there."""

    max_undone: float = 0.5
    """Largest change of the trainables between two steps, as a share of the step's own: an update that a callback
    takes back, or that an average overwrites, changes them by about 1; a schedule-free optimizer that is put into
    evaluation mode and back, by rounding errors alone."""

    code: ClassVar[str] = "B9"

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Classify every step, and count."""
        if not record.steps or all(s.effect == "unknown" for s in record.steps):
            yield self.not_evaluated(General.NO_STEP)
            return
        yield from self._unmoved(record)
        yield from self._skipped(record)
        yield from self._scale(record)
        yield from self._unsupervised(record)
        yield from self._undone(record)
        yield from self._stale(record)

    def _unmoved(self, record: RunRecord) -> Iterator[Finding]:
        warm_up = self._warm_up(record)
        # where all rewards of a group are equal, none of its answers is to be preferred
        idle = [s for s in record.steps if s.effect == "no_effect" and s.step not in warm_up and not s.tied]
        if idle:
            first = idle[0]
            seen = {"steps": len(record.steps), "learning_rate": first.learning_rate, "grad_norm": first.grad_norm}
            yield self.failed(Reason.UNMOVED, step=first.step, observed=len(idle), limit=0, **seen)
        unknown = [s for s in record.steps if s.effect == "unknown"]
        if unknown:
            yield self.failed(Reason.UNKNOWN, step=unknown[0].step)

    def _warm_up(self, record: RunRecord) -> set[int]:
        """The idle steps at the start; steps that the scaler skipped do not count, as the schedule waits for them."""
        return {s.step for s in record.taken_steps[: self.max_idle_warm_up] if s.learning_rate == 0}

    def _skipped(self, record: RunRecord) -> Iterator[Finding]:
        skipped = [s.step for s in record.steps if s.skipped]
        early = [n for n in skipped if n <= 10]
        if not len(early) <= self.max_skipped_early:
            step, steps = early[self.max_skipped_early], min(10, len(record.steps))
            limit = self.max_skipped_early
            yield self.failed(Reason.SKIPPED_EARLY, step=step, observed=len(early), limit=limit, steps=steps)
        for start in (n for n in skipped if n > 10):
            window = [n for n in skipped if start <= n < start + 10]
            if not len(window) <= self.max_skipped_late:
                step, limit = window[self.max_skipped_late], self.max_skipped_late
                yield self.failed(Reason.SKIPPED_LATE, step=step, observed=len(window), limit=limit, start=start)
                return
        if len(skipped) == len(record.steps):
            yield self.failed(Reason.SKIPPED_ALL, step=skipped[0], observed=len(skipped), limit=0)

    def _scale(self, record: RunRecord) -> Iterator[Finding]:
        for s in record.steps:
            for scale in (s.loss_scale, s.loss_scale_after):
                if scale is not None and not (math.isfinite(scale) and scale >= self.min_loss_scale):
                    yield self.failed(Reason.LOSS_SCALE, step=s.step, observed=scale, limit=self.min_loss_scale)
                    return

    def _undone(self, record: RunRecord) -> Iterator[Finding]:
        for s, following in itertools.pairwise(record.steps):
            if s.effect != "applied" or s.max_update is None or following.max_change_before is None:
                continue
            change, limit = following.max_change_before, self.max_undone * s.max_update
            if not change <= limit:
                yield self.failed(
                    Reason.CHANGED_BETWEEN, step=s.step, observed=change, limit=limit, update=s.max_update
                )
                return

    def _stale(self, record: RunRecord) -> Iterator[Finding]:
        stale = [s for s in record.steps if s.stale_gradients]
        if stale:
            first = stale[0]
            seen = {"steps": len(record.steps), "steps_stale": len(stale), "tensors": first.stale_gradients}
            observed = first.stale_gradients.count
            yield self.failed(Reason.STALE_GRADIENTS, step=first.step, observed=observed, limit=0, **seen)

    def _unsupervised(self, record: RunRecord) -> Iterator[Finding]:
        empty = [s.step for s in record.steps if s.supervised_tokens == 0]
        if empty:
            seen = {"steps": len(record.steps), "steps_empty": len(empty)}
            limit = "at least 1 label that is not -100"
            yield self.failed(Reason.UNSUPERVISED, step=empty[0], observed=0, limit=limit, **seen)
