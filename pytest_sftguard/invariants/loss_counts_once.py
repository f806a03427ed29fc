"""B23: a loss that is the cross-entropy of the model's logits counts once in each step."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pytest_sftguard import verdicts
from pytest_sftguard.invariants import _averages
from pytest_sftguard.invariants._comparing import gap
from pytest_sftguard.records import EntropyRecord, RunRecord
from pytest_sftguard.verdicts import Finding, General, Invariant

_LEAST = 3
"""Number of steps from which on a factor that they all have is no accident."""
_NOISE = 4e-6
"""Roundings of two float32 sums of the same numbers, as a share; measured up to 1e-6."""


class Reason(verdicts.Reason):
    """How often a loss counts, or why that cannot be told."""

    ADDED_UP = (
        "the loss of step 1 is {observed:.6g}: compute_loss returns the mean of each micro-batch's labels, and nothing"
        " divides them by the {total:# micro-batch} of the step, whose mean is {limit:.6g}"
    )
    DIVIDED_TWICE = (
        "the loss of step 1 is {observed:.6g}, and the mean over its labels is {limit:.6g}: it is divided by the"
        " {total:# micro-batch} of the step twice"
    )
    MULTIPLIED = (
        "the loss of each of {total:# step} is {factor:.6g} times the mean cross-entropy of the labels; that of step"
        " {step} is {observed:.6g} and not {limit:.6g}"
    )
    LIBRARY = (
        "{library}'s own code computes the loss: {observed:.6g} in step 1, with a mean of {limit:.6g} over its labels"
    )
    CHANGED = "compute_loss changes the model's own loss, of which loss_is_the_models knows more"
    NOT_SEEN = "the logits of the first step and its labels were not seen together"
    HALF = "the loss is computed in {dtype}, which tells no factor from a rounding"
    TOO_FEW = "the losses of {observed:# step} tell too little of how they are made"
    OWN = "the loss is no multiple of the cross-entropy of the labels"


@dataclass(frozen=True, kw_only=True)
class LossCountsOnce(Invariant):
    """Where a step's loss is the cross-entropy of its labels times a factor that steps have in common, that is 1.

    The mean may be over all labels of the step or over the means of its micro-batches. Any other loss, such as one with
    weights, a penalty or a teacher, is in no fixed relation to the cross-entropy. What transformers or TRL compute by
    themselves is taken as it is, and where the model's output has a loss, factors are for `loss_is_the_models` to find.
    """

    rtol: float = _averages.RTOL
    """Largest relative difference from the mean over the labels, or from so many times that mean."""
    least_factor: float = 0.01
    """Smallest difference of a factor from 1 that is reported: a small term that hardly varies looks like one."""

    code: ClassVar[str] = "B23"

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Hold the first step against its own labels, then look for a factor that several steps have in common."""
        if not record.steps:
            yield self.not_evaluated(General.NO_STEP, required=False)
            return
        first, own, step = record.first_step, _averages.of_first_step(record), record.steps[0]
        right = _averages.is_mean(record, self.rtol)
        if first is None or own is None or step.loss is None or right is None:
            yield self.not_evaluated(Reason.NOT_SEEN, required=False)
        # that a loss is not finite is for raw_loss_finite to say
        elif right or not math.isfinite(step.loss):
            return
        elif first.loss_library:
            seen: dict[str, Any] = {"library": first.loss_library, "observed": step.loss, "limit": first.token_loss}
            yield self.not_evaluated(Reason.LIBRARY, required=False, **seen)
        elif first.loss_dtype in ("bfloat16", "float16"):
            yield self.not_evaluated(Reason.HALF, required=False, dtype=first.loss_dtype)
        elif step.model_losses and not self._alike(step.micro_losses, step.model_losses):
            yield self.not_evaluated(Reason.CHANGED, required=False)
        else:
            yield self._divisor(record, step.loss, own) or self._factor(record, own)

    def _alike(self, some: Sequence[float], others: Sequence[float]) -> bool:
        return all(gap(one, other) <= self.rtol for one, other in zip(some, others, strict=True))

    def _divisor(self, record: RunRecord, loss: float, own: EntropyRecord) -> Finding | None:
        """The number of micro-batches, as a factor of the first step's loss."""
        micro = record.steps[0].micro_losses
        count = len(micro)
        if count < 2:
            return None
        seen: dict[str, Any] = {"step": 1, "observed": loss, "limit": _averages.means(own)[0], "total": count}
        if self._alike(micro, own.micro) and gap(loss, math.fsum(own.micro)) <= self.rtol:
            return self.failed(Reason.ADDED_UP, **seen)
        if any(gap(loss * count, value) <= self.rtol for value in _averages.known(record)):
            return self.failed(Reason.DIVIDED_TWICE, **seen)
        return None

    def _factor(self, record: RunRecord, own: EntropyRecord) -> Finding:
        """A factor that all steps have in common; not evaluated where there is none."""
        losses = {s.step: s.loss for s in record.steps}
        seen = [
            (e, loss)
            for e in (own, *record.entropies)
            if (loss := losses.get(e.step)) is not None and math.isfinite(loss) and all(map(math.isfinite, e.micro))
        ]
        entropies = [e for e, _ in seen]
        different = len({round(_averages.means(e)[0], 12) for e in entropies})
        if different < _LEAST:
            return self.not_evaluated(Reason.TOO_FEW, required=False, observed=different)
        for average in (0, 1):
            means = [_averages.means(e)[average] for e in entropies]
            if not all(means):
                continue
            factors = [loss / mean for mean, (_, loss) in zip(means, seen, strict=True)]
            if self._in_common(factors, means) and not _adds_tokens(factors, entropies):
                return self.failed(
                    Reason.MULTIPLIED,
                    step=1,
                    observed=seen[0][1],
                    limit=means[0],
                    factor=statistics.median(factors),
                    total=len(factors),
                )
        return self.not_evaluated(Reason.OWN, required=False)

    def _in_common(self, factors: Sequence[float], means: Sequence[float]) -> bool:
        """Whether all steps have one factor, and a term beside the loss would have shown in how the losses differ."""
        middle = statistics.median(factors)
        varied = abs(middle - 1) * (max(means) - min(means)) / max(map(abs, means))
        noise = _NOISE * max(1.0, abs(middle))
        return abs(middle - 1) >= self.least_factor and max(factors) - min(factors) <= noise and varied >= 20 * noise


def _adds_tokens(factors: Sequence[float], steps: Sequence[EntropyRecord]) -> bool:
    """Whether the factor may be a number of tokens, equal in all micro-batches: a loss that is a sum on purpose."""
    counts = {n for s in steps for n in s.tokens}
    middle = statistics.median(factors)
    return len(counts) == 1 and middle > 2 and abs(middle - round(middle)) <= 1e-4 * middle
