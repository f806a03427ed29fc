"""B9: every optimizer step took effect, but for the few that a loss scaler may skip."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard.records import RunRecord
from pytest_sftguard.verdicts import Finding, Invariant


@dataclass(frozen=True, kw_only=True)
class EffectiveSteps(Invariant):
    """Steps are counted by what they changed, and all of them changed something."""

    max_skipped_early: int = 3
    """Steps that the scaler may skip among the first ten: it starts at 65536 and halves until the gradients fit."""
    max_skipped_late: int = 1
    """Steps that it may skip in any ten after that: growth probes overflow now and then."""
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
            yield self.not_evaluated("no optimizer step was seen")
            return
        yield from self._unmoved(record)
        yield from self._skipped(record)
        yield from self._scale(record)
        yield from self._unsupervised(record)
        yield from self._undone(record)
        yield from self._stale(record)

    def _unmoved(self, record: RunRecord) -> Iterator[Finding]:
        warm_up = self._warm_up(record)
        idle = [s for s in record.steps if s.effect == "no_effect" and s.step not in warm_up]
        if idle:
            yield self.failed(
                f"{len(idle)} of {len(record.steps)} steps changed no parameter (first: step {idle[0].step}, "
                f"learning rate {idle[0].learning_rate}, grad_norm {idle[0].grad_norm})",
                step=idle[0].step, observed=len(idle), limit=0,
            )  # fmt: skip
        unknown = [s for s in record.steps if s.effect == "unknown"]
        if unknown:
            yield self.failed(f"what step {unknown[0].step} did was not seen", step=unknown[0].step)

    def _warm_up(self, record: RunRecord) -> set[int]:
        """The idle steps at the start; steps that the scaler skipped do not count, as the schedule waits for them."""
        taken = [s for s in record.steps if s.effect != "skipped_by_scaler"]
        return {s.step for s in taken[: self.max_idle_warm_up] if s.learning_rate == 0}

    def _skipped(self, record: RunRecord) -> Iterator[Finding]:
        skipped = [s.step for s in record.steps if s.effect == "skipped_by_scaler"]
        early = [n for n in skipped if n <= 10]
        if not len(early) <= self.max_skipped_early:
            yield self.failed(
                f"the loss scaler skipped {len(early)} of the first {min(10, len(record.steps))} steps",
                step=early[self.max_skipped_early], observed=len(early), limit=self.max_skipped_early,
            )  # fmt: skip
        for start in (n for n in skipped if n > 10):
            window = [n for n in skipped if start <= n < start + 10]
            if not len(window) <= self.max_skipped_late:
                yield self.failed(
                    f"the loss scaler skipped {len(window)} of the ten steps from step {start}",
                    step=window[self.max_skipped_late], observed=len(window), limit=self.max_skipped_late,
                )  # fmt: skip
                return
        if len(skipped) == len(record.steps):
            yield self.failed("the loss scaler skipped every step", step=skipped[0], observed=len(skipped), limit=0)

    def _scale(self, record: RunRecord) -> Iterator[Finding]:
        for s in record.steps:
            for scale in (s.loss_scale, s.loss_scale_after):
                if scale is not None and not (math.isfinite(scale) and scale >= self.min_loss_scale):
                    yield self.failed(
                        f"the loss scale is {scale:g} at step {s.step}",
                        step=s.step, observed=scale, limit=self.min_loss_scale,
                    )  # fmt: skip
                    return

    def _undone(self, record: RunRecord) -> Iterator[Finding]:
        for s, following in itertools.pairwise(record.steps):
            if s.effect != "applied" or s.max_update is None or following.max_change_before is None:
                continue
            if not following.max_change_before <= self.max_undone * s.max_update:
                yield self.failed(
                    f"something else than the optimizer changed the adapter after step {s.step}, by"
                    f" {following.max_change_before:.3g}, where the step itself changed it by {s.max_update:.3g}",
                    step=s.step, observed=following.max_change_before, limit=self.max_undone * s.max_update,
                )  # fmt: skip
                return

    def _stale(self, record: RunRecord) -> Iterator[Finding]:
        stale = [s for s in record.steps if s.stale_gradients]
        if stale:
            yield self.failed(
                f"{len(stale)} of {len(record.steps)} steps began with gradients of an earlier one (first: step"
                f" {stale[0].step}, {stale[0].stale_gradients}): nothing cleared them",
                step=stale[0].step, observed=stale[0].stale_gradients.count, limit=0,
            )  # fmt: skip

    def _unsupervised(self, record: RunRecord) -> Iterator[Finding]:
        empty = [s.step for s in record.steps if s.supervised_tokens == 0]
        if empty:
            yield self.failed(
                f"{len(empty)} of {len(record.steps)} steps had no supervised token (first: step {empty[0]})",
                step=empty[0], observed=0, limit="at least 1 label that is not -100",
            )  # fmt: skip
