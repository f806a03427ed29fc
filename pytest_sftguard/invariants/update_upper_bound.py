"""B5: no step of Adam moves an element further than Adam can."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard import verdicts
from pytest_sftguard.records import RunRecord
from pytest_sftguard.verdicts import Finding, General, Invariant


class Reason(verdicts.Reason):
    """Why a step cannot be Adam's, or cannot be held to its bound."""

    NO_BOUND = "{optimizer} sets no bound to its updates"
    NO_BETAS = "Adam's two betas were not seen"
    NOT_SEEN = "how far step {step} moved the tensors was not seen"
    TOO_FAR = (
        "an element of {tensor} moved by {observed:.3g} learning rates at step {step}; {optimizer} moves it by"
        " {limit:.3g} at most"
    )


@dataclass(frozen=True, kw_only=True)
class UpdateUpperBound(Invariant):
    """Each change of an element is within Adam's bound, in learning rates of the tensor's own parameter group.

    Weight decay and one rounding in the tensor's type are taken off before. At step t the update is at most the larger
    of `max_ratio` and sqrt(sum(w**2 / u)) learning rates, where w and u are the weights that the two bias-corrected
    moments give to each of the t gradients; no gradients whatever can exceed it (Cauchy and Schwarz).
    """

    max_ratio: float = 3.2
    """Learning rates that one step may always move an element by: (1 - beta1) / sqrt(1 - beta2) is 3.16 for Adam's
    usual 0.9 and 0.999, the largest step without a correction of the bias. Measured: 0.9 to 1.06 in float32, up to 1.22
    with bfloat16 adapters; 41 to 80,000 where float16 stores the second moment as 0."""

    code: ClassVar[str] = "B5"

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Hold each step to what is possible."""
        if record.optimizer is None or not record.steps:
            yield self.not_evaluated(General.NO_STEP)
            return
        betas = record.optimizer.betas
        if not betas:
            yield self.not_evaluated(Reason.NO_BOUND, required=False, optimizer=record.optimizer.name)
            return
        if len(betas) != 2:
            yield self.not_evaluated(Reason.NO_BETAS)
            return
        for s in record.steps:
            if s.max_update_ratio is None:
                yield self.not_evaluated(Reason.NOT_SEEN, step=s.step)
                return
            limit = max(self.max_ratio, _bound(*betas, s.step))
            if not s.max_update_ratio <= limit:
                seen = {"tensor": s.max_update_tensor or "a tensor", "optimizer": record.optimizer.name}
                yield self.failed(Reason.TOO_FAR, step=s.step, observed=s.max_update_ratio, limit=limit, **seen)
                return


def _bound(beta1: float, beta2: float, step: int) -> float:
    """Largest update of Adam's `step`-th step in learning rates; 0 where the betas are none."""
    if not (0 <= beta1 < 1 and 0 < beta2 < 1):
        return 0.0
    ratio = beta1**2 / beta2
    total = step if ratio == 1 else (1 - ratio**step) / (1 - ratio)
    return (1 - beta1) / (1 - beta1**step) * math.sqrt(total * (1 - beta2**step) / (1 - beta2))
