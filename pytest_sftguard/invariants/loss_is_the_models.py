"""B22: the loss that is trained on is the one that the model computed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard import verdicts
from pytest_sftguard.invariants import _averages
from pytest_sftguard.records import RunRecord, StepRecord
from pytest_sftguard.verdicts import Finding, General, Invariant, Outcome

_LEAST = 3
"""Number of different losses from which on a rule that they all follow is no accident. Two are enough in float32, if
they follow it to the last digits."""
_SLACK = 1e-3
"""Share of a factor or a sum by which several may differ, for a term that comes along."""
_COARSEST, _FINEST = 1, 12
"""Significant bits of a rounded loss; all of several losses have 12 by accident once in ten million times."""


class Reason(verdicts.Reason):
    """How the loss is changed on its way, or why that cannot be told."""

    MULTIPLIED = "compute_loss returns {observed:.6g} times the loss that the model computed, in every micro-batch"
    MULTIPLIED_AT_TIMES = (
        "compute_loss returns {observed:.6g} times the loss that the model computed in {count} of"
        " {total:# micro-batch}, and the model's own in the others"
    )
    SHIFTED = "compute_loss returns the loss that the model computed plus {observed:.6g}, in every micro-batch"
    SHIFTED_AT_TIMES = (
        "compute_loss returns the loss that the model computed plus {observed:.6g} in {count} of"
        " {total:# micro-batch}, and the model's own in the others"
    )
    OFFSET = (
        "compute_loss adds numbers to the loss that the model computed in {count} of {total:# micro-batch}, first"
        " {observed:.6g}: no weight enters them, so that they change the loss and teach nothing"
    )
    ROUNDED = (
        "compute_loss returns the loss that the model computed rounded to {observed} significant bits, in {count} of"
        " {total:# micro-batch}"
    )
    LIBRARY = "{library}'s own compute_loss divides or extends the loss that the model computes"
    NOT_SEEN = "the loss is not that of one forward pass of the model"
    TOO_FEW = "compute_loss changes the model's own loss, and {observed:# different loss} cannot tell by which rule"
    OWN = "compute_loss computes a loss of its own beside the model's"


@dataclass(frozen=True, kw_only=True)
class LossIsTheModels(Invariant):
    """What `compute_loss` returns for a micro-batch is the loss in the model's output, unless it is another loss.

    Another loss, such as one with weights, a penalty or a teacher, is in no fixed relation to the model's own. A
    multiple of it, or a sum with a constant, is the same loss changed on the way: divided twice by the accumulation,
    negated, scaled from some step on. So is a sum with any number that no weight enters, such as a penalty that is
    detached. What the `compute_loss` of transformers or TRL itself returns, which may divide
    by tokens or multiply by processes, is taken as it is.
    """

    rtol: float = 1e-5
    """Largest relative difference of two float32 losses that are one: 25 times what their roundings make of a factor,
    so that a small term that comes along is told apart from a factor."""
    half_rtol: float = 0.1
    """The same of losses in half precision."""

    code: ClassVar[str] = "B22"

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Compare each pair, and look for the rule that those which differ have in common."""
        if not record.steps:
            yield self.not_evaluated(General.NO_STEP, required=False)
            return
        pairs = [
            (s.step, loss, own)
            for s in record.steps
            for loss, own in zip(s.micro_losses, s.model_losses or (math.nan,) * len(s.micro_losses), strict=False)
            # that a loss is not finite is for raw_loss_finite to say
            if math.isfinite(loss) and math.isfinite(own)
        ]
        offset = {(s.step, loss, own) for s in record.steps for loss, own, added in _offsets(s) if added}
        if not pairs:
            yield self.not_evaluated(Reason.NOT_SEEN, required=False)
            return
        half = record.first_step is not None and record.first_step.loss_dtype in ("bfloat16", "float16")
        rtol = self.half_rtol if half else self.rtol
        others = [(step, loss, own) for step, loss, own in pairs if not abs(loss - own) <= rtol * abs(own)]
        library = "" if record.first_step is None else record.first_step.loss_library
        if others and library:
            yield self.not_evaluated(Reason.LIBRARY, required=False, library=library)
        elif others and not _divides(record, others, len(pairs), rtol):
            finding = self._rule(others, len(pairs), rtol)
            yield finding if finding.outcome is Outcome.FAILED else self._offset(others, offset, len(pairs)) or finding

    def _offset(
        self, others: Sequence[tuple[int, float, float]], offset: Collection[tuple[int, float, float]], total: int
    ) -> Finding | None:
        """A failure where each loss that differs is the model's with a number added."""
        if not all(pair in offset for pair in others):
            return None
        step, loss, own = others[0]
        return self.failed(Reason.OFFSET, step=step, observed=loss - own, limit=0, count=len(others), total=total)

    def _rule(self, others: Sequence[tuple[int, float, float]], total: int, rtol: float) -> Finding:
        """What the losses that differ from the model's have in common; not evaluated where it is nothing."""
        seen = {"step": others[0][0], "limit": 0, "count": len(others), "total": total}
        always = len(others) == total
        bits = _rounded([(loss, own) for _, loss, own in others])
        if bits is not None:
            return self.failed(Reason.ROUNDED, observed=bits, **(seen | {"limit": 24}))
        different = len({own for *_, own in others})
        if different < (_LEAST if rtol > self.rtol else 2):
            return self.not_evaluated(Reason.TOO_FEW, required=False, observed=different)
        slack = _SLACK if different >= _LEAST else 0.0
        factors = [loss / own for _, loss, own in others if own]
        if len(factors) == len(others) and _alike([f - 1 for f in factors], rtol / 25, slack):
            reason = Reason.MULTIPLIED if always else Reason.MULTIPLIED_AT_TIMES
            return self.failed(reason, observed=statistics.median(factors), **(seen | {"limit": 1}))
        sums = [loss - own for _, loss, own in others]
        # a difference of two losses has their roundings
        largest = max(abs(x) for _, loss, own in others for x in (loss, own))
        if _alike(sums, rtol / 25 * largest, slack):
            reason = Reason.SHIFTED if always else Reason.SHIFTED_AT_TIMES
            return self.failed(reason, observed=statistics.median(sums), **seen)
        return self.not_evaluated(Reason.OWN, required=False)


def _offsets(step: StepRecord) -> Iterator[tuple[float, float, bool]]:
    """Each micro-batch's loss, the model's, and whether the one is the other with a number added."""
    if len(step.micro_losses) == len(step.model_losses) == len(step.offsets):
        yield from zip(step.micro_losses, step.model_losses, step.offsets, strict=True)


def _divides(record: RunRecord, others: Sequence[tuple[int, float, float]], total: int, rtol: float) -> bool:
    """Whether compute_loss divides the model's own by the number of micro-batches, which the Trainer leaves to it."""
    count = len(record.steps[0].micro_losses)
    divided = all(abs(count * loss - own) <= rtol * abs(own) for _, loss, own in others)
    return divided and len(others) == total and bool(_averages.is_mean(record))


def _alike(numbers: Sequence[float], noise: float, slack: float) -> bool:
    """Whether all are one number, well away from 0, but for `noise`: a term that follows the loss varies by more."""
    middle = statistics.median(numbers)
    return abs(middle) >= 20 * noise and max(numbers) - min(numbers) <= noise + slack * abs(middle)


def _rounded(pairs: Sequence[tuple[float, float]]) -> int | None:
    """Significant bits of the first numbers, if they are the second ones rounded to so many; None if they are not."""
    if len({own for _, own in pairs}) < _LEAST:
        return None
    largest = max(abs(own) for _, own in pairs)
    return next(
        (
            bits
            for bits in range(_COARSEST, _FINEST + 1)
            # the smaller ones have fewer where all are multiples of one number
            if all(_has_bits(loss, bits) and abs(loss - own) <= largest * 2**-bits for loss, own in pairs)
        ),
        None,
    )


def _has_bits(number: float, bits: int) -> bool:
    """Whether a float32 number has no more significant bits, but for its last two."""
    mantissa, _ = math.frexp(number)
    return bool(abs(mantissa - round(mantissa * 2**bits) / 2**bits) <= 2**-22)
