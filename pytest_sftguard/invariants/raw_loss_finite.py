"""B1: the loss of every micro-batch is finite, as the model gave it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard.records import RunRecord
from pytest_sftguard.verdicts import Finding, Invariant


@dataclass(frozen=True, kw_only=True)
class RawLossFinite(Invariant):
    """Every micro-batch's loss is finite before the Trainer's `logging_nan_inf_filter` can replace it."""

    code: ClassVar[str] = "B1"

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Look at the raw loss of every micro-batch of every step."""
        if not any(s.micro_losses for s in record.steps):
            yield self.not_evaluated("no micro-batch loss was seen")
            return
        bad = [s for s in record.steps if not all(map(math.isfinite, (*s.micro_losses, _sum(s.loss))))]
        if bad:
            first = bad[0]
            values = (*first.micro_losses, _sum(first.loss))
            which, value = next((i, v) for i, v in enumerate(values, 1) if not math.isfinite(v))
            where = f"micro-batch {which}" if which <= len(first.micro_losses) else "their sum"
            yield self.failed(
                f"loss is not finite at {len(bad)} of {len(record.steps)} steps (first: step {first.step}, {where})"
                + _logged(record, first.step),
                step=first.step, observed=value, limit="finite",
            )  # fmt: skip


def _sum(loss: float | None) -> float:
    return math.nan if loss is None else loss


def _logged(record: RunRecord, step: int) -> str:
    for line in record.log:
        if line.step == step and line.loss is not None and math.isfinite(line.loss):
            return f"; the Trainer's log shows {line.loss:g} there"
    return ""
