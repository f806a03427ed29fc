"""B1: the loss of every micro-batch is finite, as the model gave it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from pytest_sftguard import verdicts
from pytest_sftguard.records import RunRecord, StepRecord
from pytest_sftguard.verdicts import Finding, Invariant


class Reason(verdicts.Reason):
    """Which loss is not finite."""

    NOT_SEEN = "no micro-batch loss was seen"
    NONFINITE = (
        "loss is not finite at {bad} of {steps:# step} (first: step {step}[[, micro-batch {micro_batch}]])"
        "[[; the Trainer's log shows {logged:g} there]]"
    )


@dataclass(frozen=True, kw_only=True)
class RawLossFinite(Invariant):
    """Every micro-batch's loss is finite before the Trainer's `logging_nan_inf_filter` can replace it."""

    code: ClassVar[str] = "B1"

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Look at the raw loss of every micro-batch of every step."""
        if not any(s.micro_losses for s in record.steps):
            yield self.not_evaluated(Reason.NOT_SEEN)
            return
        bad = [s for s in record.steps if not all(map(math.isfinite, (*s.micro_losses, _sum(s))))]
        if bad:
            first = bad[0]
            # the sum may be what is not finite, where no micro-batch's loss is
            losses: list[tuple[int | None, float]] = [*enumerate(first.micro_losses, 1), (None, _sum(first))]
            which, value = next((n, loss) for n, loss in losses if not math.isfinite(loss))
            logged = (line.loss for line in record.log if line.step == first.step and line.loss is not None)
            seen: dict[str, Any] = {"bad": len(bad), "steps": len(record.steps), "micro_batch": which}
            seen["logged"] = next(filter(math.isfinite, logged), None)
            yield self.failed(Reason.NONFINITE, step=first.step, observed=value, limit="finite", **seen)


def _sum(step: StepRecord) -> float:
    return math.nan if step.loss is None else step.loss
