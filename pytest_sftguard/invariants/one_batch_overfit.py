"""C5: on one batch, seen over and over, the loss falls."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard.invariants._comparing import agreement
from pytest_sftguard.records import RunRecord
from pytest_sftguard.verdicts import Finding, Invariant


@dataclass(frozen=True, kw_only=True)
class OneBatchOverfit(Invariant):
    """The raw loss of a batch that is trained on alone is finite, moves, falls, and does not settle half-way.

    Over shuffled batches a loss falls and rises by the batches alone: 11 of 20 runs with learning rate 0 end lower than
    they began. Here nothing but the weights changes.
    """

    noise_rtol: float | None = None
    """Difference, as a share of the first loss, that says nothing; None: 0 in float32, where the loss of a batch is a
    function of the weights, elsewhere the tolerance of the cell's precision."""

    min_signal: float = 3.0
    """Least difference of first and last losses, in standard errors, that says anything where the model draws random
    numbers. Measured 8 to 40 with dropout up to 0.5, 0.9 (and not evaluated) under NEFTune noise on a tiny model."""

    settled: float = 0.02
    """Largest difference between the last quarter and the one before it, as a share of the whole fall, of a loss that
    has settled. Falling ones have 0.05 or more, at a learning rate that decays to 0 too."""

    half_way: float = 0.5
    """Least share of the way to the labels' entropy that counts as a collapse to their distribution: a model of which
    the frozen head is random cannot go that far at all (0.1 to 0.25 measured)."""

    code: ClassVar[str] = "C5"
    reference: ClassVar[str] = "one_batch"

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Look at the losses of the one batch."""
        if missing := self.not_compared(reference):
            yield missing
            return
        assert reference is not None
        losses = reference.losses
        if len(losses) < 4 or any(s.loss is None for s in reference.steps):
            yield self.not_evaluated(f"{len(losses)} losses of one batch were seen, and 4 are needed")
            return
        bad = next((n for n, loss in enumerate(losses, 1) if not math.isfinite(loss)), None)
        if bad is not None:
            yield self.failed(
                f"trained on one batch alone, the loss is {losses[bad - 1]} at step {bad}",
                step=bad, observed=losses[bad - 1], limit="finite",
            )  # fmt: skip
        elif len(set(losses)) == 1:
            yield from self._constant(record, reference)
        else:
            yield from self._falls(record, reference, losses)

    def _constant(self, record: RunRecord, reference: RunRecord) -> Iterator[Finding]:
        applied = [s for s in reference.steps if s.effect == "applied"]
        if self._noise(record) > 0 and applied:
            yield self.not_evaluated(
                f"the loss of one batch stayed the same for {len(reference.steps)} steps: {record.precision} rounds"
                " away what the adapter changed",
                required=False,
            )
            return
        loss = reference.losses[0]
        yield self.failed(
            f"trained on one batch alone, the loss is {loss:.6g} at all of {len(reference.steps)} steps, to the bit:"
            " nothing is learned",
            step=2, observed=loss, limit="falls",
        )  # fmt: skip

    def _falls(self, record: RunRecord, reference: RunRecord, losses: Sequence[float]) -> Iterator[Finding]:
        quarter = max(1, len(losses) // 4)
        last = statistics.fmean(losses[-quarter:])
        random = bool(reference.first_step is None or reference.first_step.random)
        first = statistics.fmean(losses[:quarter]) if random else losses[0]
        unclear = self._noise(record) * abs(first)
        if random:
            unclear = max(unclear, self.min_signal * _spread(losses) * math.sqrt(2 / quarter))
        fall = first - last
        if fall > unclear:
            yield from self._settled(reference, losses, quarter, last)
        elif fall < -unclear or unclear == 0:
            yield self.failed(
                f"trained on one batch alone, the loss does not fall: {first:.6g} at first,"
                f" {last:.6g} after {len(losses)} steps",
                observed=last, limit=first,
            )  # fmt: skip
        else:
            yield self.not_evaluated(
                f"the loss of one batch changed by {-fall:.2g} in {len(losses)} steps, less than dropout or rounding"
                f" can ({unclear:.2g})",
                required=False,
            )

    def _settled(self, reference: RunRecord, losses: Sequence[float], quarter: int, last: float) -> Iterator[Finding]:
        """A learning rate too high ends in the distribution of the labels, one answer to all, or before it."""
        entropy = reference.first_step.label_entropy if reference.first_step is not None else None
        if entropy is None or not last >= entropy:
            return
        if all(s.grad_norm == 0 for s in reference.steps[-quarter:]):  # logits that nothing moves any more
            yield self.failed(
                f"trained on one batch alone, the loss stopped at {last:.4g}, where every gradient is exactly 0:"
                f" whoever knows the distribution of the labels and nothing else has {entropy:.4g}",
                observed=last, limit=entropy,
            )  # fmt: skip
            return
        fall = losses[0] - last
        before = statistics.fmean(losses[-2 * quarter : -quarter])
        if fall >= self.half_way * (losses[0] - entropy) and not abs(before - last) > self.settled * fall:
            yield self.failed(
                f"trained on one batch alone, the loss fell to {last:.4g} and settled there: whoever knows the"
                f" distribution of the labels and nothing else has {entropy:.4g}",
                observed=last, limit=entropy,
            )  # fmt: skip

    def _noise(self, record: RunRecord) -> float:
        if self.noise_rtol is not None:
            return self.noise_rtol
        return 0.0 if record.precision == "fp32" else agreement(record).loss_rtol


def _spread(losses: Sequence[float]) -> float:
    """Standard deviation of the noise in `losses`, from the differences of neighbours: their trend cancels."""
    return statistics.pstdev(b - a for a, b in itertools.pairwise(losses)) / math.sqrt(2)
