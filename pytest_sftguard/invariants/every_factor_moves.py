"""B4: every trainable tensor moves, `lora_A` as well as `lora_B`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard.invariants._due import Due, without_tensors
from pytest_sftguard.records import Names, RunRecord, TensorRecord
from pytest_sftguard.verdicts import Finding, Invariant


@dataclass(frozen=True, kw_only=True)
class EveryFactorMoves(Invariant):
    """Every factor that starts at zero changes on each effective step, every other trainable from the second on."""

    min_changed_fraction: float = 0.9
    """Share of a factor's elements that must differ from their start at the end.

    Measured: 1.0 in float32; 0.256 and less where bfloat16 adapters swallow their updates.
    """

    code: ClassVar[str] = "B4"

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Look at each effective step, and at each tensor over the whole run."""
        if not record.steps:
            yield self.not_evaluated("no optimizer step was seen")
            return
        if nothing := without_tensors(self, record):
            yield nothing
            return
        effective = [s for s in record.steps if s.effect == "applied"]
        if not effective:
            yield self.failed("no step left a changed, finite adapter", observed=0, limit="at least 1 step")
            return
        due = Due(record)
        told = False
        for s in effective:
            still = due.among(s.unchanged.first, s)
            due.effective(s)
            if still and not told:
                told = True
                yield self.failed(
                    f"{Names.of(still)} did not change at step {s.step}",
                    step=s.step, observed=len(still), limit="every factor changes",
                )  # fmt: skip
        yield from self._over_the_run(list(due.over_the_run()))

    def _over_the_run(self, due: list[TensorRecord]) -> Iterator[Finding]:
        still = [t for t in due if not (t.delta_norm is not None and t.delta_norm > 0)]
        if still:
            yield self.failed(
                f"{Names.of(t.name for t in still)} did not leave its start to a finite place"
                f" ({len(still)} of {len(due)} tensors)",
                observed=still[0].delta_norm, limit="> 0",
            )  # fmt: skip
        partly = [t for t in due if t.is_factor and t not in still and not self._moved(t)]
        if partly:
            least = min(partly, key=_fraction)
            yield self.failed(
                f"{_fraction(least):.1%} of the elements of {least.name} ever changed"
                f" ({len(partly)} of {len(due)} tensors are below the limit)",
                observed=_fraction(least), limit=self.min_changed_fraction,
            )  # fmt: skip

    def _moved(self, tensor: TensorRecord) -> bool:
        return _fraction(tensor) >= self.min_changed_fraction


def _fraction(tensor: TensorRecord) -> float:
    return math.nan if tensor.changed_fraction is None else tensor.changed_fraction
