"""C5: on one batch, seen over and over, the loss falls."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard import verdicts
from pytest_sftguard.invariants._comparing import Comparing
from pytest_sftguard.precision import mode_named
from pytest_sftguard.records import RunRecord
from pytest_sftguard.verdicts import Finding

_ALONE = "trained on one batch alone, the loss"
_LABELS_ALONE = "knowing the distribution of the labels and nothing else gives {limit:.4g}"


class Reason(verdicts.Reason):
    """How a training on one batch goes wrong."""

    TOO_FEW = "the loss of one batch was seen at {seen} of {steps:# step}, and all of 4 or more are needed"
    NOT_FINITE = f"{_ALONE} is {{observed}} at step {{step}}"
    ROUNDED_AWAY = (
        "the loss of one batch is the same at all of {steps:# step}: {precision} rounds away what the adapter changed"
    )
    CONSTANT = f"{_ALONE} is {{observed:.6g}} at all of {{steps:# step}}, to the bit: nothing is learned"
    DOES_NOT_FALL = f"{_ALONE} does not fall: {{limit:.6g}} at first, {{observed:.6g}} after {{steps:# step}}"
    UNCLEAR = (
        "the loss of one batch changed by {change:.2g} in {steps:# step}, less than dropout or rounding can"
        " ({unclear:.2g})"
    )
    DEAD = f"{_ALONE} stopped at {{observed:.4g}}, where every gradient is exactly 0: {_LABELS_ALONE}"
    SETTLED = f"{_ALONE} fell to {{observed:.4g}} and settled there: {_LABELS_ALONE}"


@dataclass(frozen=True, kw_only=True)
class OneBatchOverfit(Comparing):
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
    judges_reference_alone: ClassVar[bool] = True

    def compare(self, record: RunRecord, reference: RunRecord) -> Iterator[Finding]:
        """Look at the losses of the one batch."""
        losses, seen = reference.losses, sum(s.loss is not None for s in reference.steps)
        if len(losses) < 4 or seen < len(losses):
            yield self.not_evaluated(Reason.TOO_FEW, seen=seen, steps=len(losses))
            return
        bad = next((n for n, loss in enumerate(losses, 1) if not math.isfinite(loss)), None)
        if bad is not None:
            yield self.failed(Reason.NOT_FINITE, step=bad, observed=losses[bad - 1], limit="finite")
        elif len(set(losses)) == 1:
            yield self._constant(record, reference)
        else:
            yield from self._falls(record, reference, losses)

    def _constant(self, record: RunRecord, reference: RunRecord) -> Finding:
        steps = len(reference.steps)
        if self._noise(record) > 0 and any(s.effect == "applied" for s in reference.steps):
            return self.not_evaluated(Reason.ROUNDED_AWAY, required=False, steps=steps, precision=record.precision)
        return self.failed(Reason.CONSTANT, step=2, observed=reference.losses[0], limit="falls", steps=steps)

    def _falls(self, record: RunRecord, reference: RunRecord, losses: Sequence[float]) -> Iterator[Finding]:
        quarter, steps = max(1, len(losses) // 4), len(losses)
        last = statistics.fmean(losses[-quarter:])
        random = bool(reference.first_step is None or reference.first_step.random)
        first = statistics.fmean(losses[:quarter]) if random else losses[0]
        noise = _spread(losses) * math.sqrt(2 / quarter) if random else 0.0
        unclear = max(self._noise(record) * abs(first), self.min_signal * noise)
        fall = first - last
        if fall > unclear:
            yield from self._settled(reference, losses, quarter, noise)
        elif fall < -unclear or unclear == 0:
            yield self.failed(Reason.DOES_NOT_FALL, observed=last, limit=first, steps=steps)
        else:
            yield self.not_evaluated(Reason.UNCLEAR, required=False, change=-fall, unclear=unclear, steps=steps)

    def _settled(self, reference: RunRecord, losses: Sequence[float], quarter: int, noise: float) -> Iterator[Finding]:
        """A learning rate too high ends in the distribution of the labels, one answer to all, or before it.

        `noise` is the standard error of the difference between two quarters.
        """
        last = statistics.fmean(losses[-quarter:])
        entropy = reference.first_step.label_entropy if reference.first_step is not None else None
        if entropy is None or not last >= entropy:
            return
        # logits that nothing moves any more
        if all(s.grad_norm == 0 for s in reference.steps[-quarter:]):
            yield self.failed(Reason.DEAD, observed=last, limit=entropy)
            return
        fall = losses[0] - last
        before = statistics.fmean(losses[-2 * quarter : -quarter])
        change, most = abs(before - last), self.settled * fall
        if not fall >= self.half_way * (losses[0] - entropy) or change > most:
            return
        # a loss that still falls by more than that would look so as well, by chance
        if 2 * noise > most:
            yield self.not_evaluated(Reason.UNCLEAR, required=False, change=change, unclear=2 * noise, steps=quarter)
        else:
            yield self.failed(Reason.SETTLED, observed=last, limit=entropy)

    def _noise(self, record: RunRecord) -> float:
        if self.noise_rtol is not None:
            return self.noise_rtol
        return 0.0 if record.precision == "fp32" else mode_named(record.precision).agreement.loss_rtol


def _spread(losses: Sequence[float]) -> float:
    """Standard deviation of the noise in `losses`, from the differences of neighbours: their trend cancels."""
    return statistics.pstdev(b - a for a, b in itertools.pairwise(losses)) / math.sqrt(2)
