"""B21: each update is the one that the optimizer's class makes of its gradient."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard import verdicts
from pytest_sftguard.records import RunRecord
from pytest_sftguard.verdicts import Finding, General, Invariant


class Reason(verdicts.Reason):
    """Where an update is another one, or why no step was repeated."""

    OTHER = (
        "the update of {tensor} at step {step} is not the one that {optimizer} makes of the same gradient and state:"
        " an element differs by {observed:.2g} of the largest update"
    )
    NOT_REPEATED = (
        "no step was repeated: {optimizer} does not treat each element by itself, or the tensors differ in type or lack"
        " a gradient"
    )


@dataclass(frozen=True, kw_only=True)
class UpdateRepeats(Invariant):
    """A second optimizer of the same class makes the same update of the same gradient, state and options.

    It is compared for some elements of each tensor, in the steps 1 to 4, 8 and every sixteenth, for the optimizers of
    torch that treat each element by itself. What changes the weights after the step, or instead of it, makes a
    difference.
    """

    max_share: float = 1e-3
    """Largest difference of an element beyond 8 roundings of the weight, relative to the tensor's largest update.
    Measured: exactly 0 in 220 healthy trainings in float32, bfloat16 and float16; kernels of other devices may add the
    terms in another order."""

    code: ClassVar[str] = "B21"

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Find the first step whose worst tensor is over the limit."""
        if record.optimizer is None or not record.steps:
            yield self.not_evaluated(General.NO_STEP, required=False)
            return
        name = record.optimizer.name
        seen = [s for s in record.steps if s.departure is not None]
        if not seen:
            yield self.not_evaluated(Reason.NOT_REPEATED, required=False, optimizer=name)
        for s in seen:
            if s.departure is None or not s.departure <= self.max_share:
                seen_of = {"tensor": s.departure_tensor, "optimizer": name}
                yield self.failed(Reason.OTHER, step=s.step, observed=s.departure, limit=self.max_share, **seen_of)
                return
