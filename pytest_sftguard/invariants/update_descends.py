"""B15: the first update goes downhill."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard import verdicts
from pytest_sftguard.records import RunRecord
from pytest_sftguard.verdicts import Finding, Invariant


class Reason(verdicts.Reason):
    """How the update goes uphill, or why its direction is not known."""

    UPHILL = (
        "the first update of the weights follows the gradient instead of opposing it: their cosine is {observed:.2g}"
    )
    TENSOR_UPHILL = (
        "the first update of {tensor} follows its gradient instead of opposing it: their cosine is {observed:.2g}"
    )
    NOT_MOVED = "no step moved a tensor that has a gradient"
    UNCOMPARED = "the first update was not compared with its gradient: {why}"


@dataclass(frozen=True, kw_only=True)
class UpdateDescends(Invariant):
    """The first update that moves the weights opposes the gradient of the loss, as a whole and in each tensor.

    It sees an error of sign between the backward pass and the weights: `maximize=True`, gradients that a callback
    negates, an optimizer that adds. A loss that is itself negated has a gradient that is negated with it, and cannot be
    seen here. Only the first update is judged, because momentum lets later ones leave the gradient's direction. Where
    steps without an effect came before it, as in a warm-up from zero, the update is judged as a whole only, and may
    oppose the sum of their gradients and its own instead.
    """

    max_cosine: float = 0.05
    """Largest cosine of the update with the gradient.

    Measured in 120 healthy trainings: at most -0.13 as a whole, -0.31 in single tensors. A wrong sign mirrors that.
    What is orthogonal but for noise is not called uphill.
    """

    code: ClassVar[str] = "B15"

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Look at the one step whose direction was recorded."""
        first = next((s for s in record.steps if s.update_cosine is not None), None)
        if first is None or first.update_cosine is None:
            why = next((s.update_uncompared for s in record.steps if s.update_uncompared), "")
            reason = Reason.UNCOMPARED if why else Reason.NOT_MOVED
            yield self.not_evaluated(reason, required=False, why=why)
            return
        if not first.update_cosine <= self.max_cosine:
            yield self.failed(Reason.UPHILL, step=first.step, observed=first.update_cosine, limit=self.max_cosine)
            return
        own = first.uphill_cosine
        if first.uphill_tensor and not (own is not None and own <= self.max_cosine):
            tensor, limit = first.uphill_tensor, self.max_cosine
            yield self.failed(Reason.TENSOR_UPHILL, step=first.step, observed=own, limit=limit, tensor=tensor)
