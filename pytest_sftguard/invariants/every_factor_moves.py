"""B4: every trainable tensor moves, `lora_A` as well as `lora_B`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from pytest_sftguard import verdicts
from pytest_sftguard.invariants._due import Due, without_tensors
from pytest_sftguard.records import Names, RunRecord, TensorRecord
from pytest_sftguard.verdicts import Finding, General, Invariant


class Reason(verdicts.Reason):
    """Which tensors did not move."""

    NO_EFFECT = "no step left a changed, finite adapter"
    SGD = "SGD's updates are as small as the gradients, and small ones are lost in a rounding of the weights"
    STILL_AT_STEP = "{names} did not change at step {step}"
    STILL = "no finite change other than zero of {names} over the run ({still} of {due:# tensor})"
    PARTLY = "{observed:.1%} of the elements of {tensor} ever changed ({partly} of {due:# tensor} below the limit)"


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
            yield self.not_evaluated(General.NO_STEP)
            return
        if nothing := without_tensors(self, record):
            yield nothing
            return
        effective = [s for s in record.steps if s.effect == "applied"]
        if not effective:
            yield self.failed(Reason.NO_EFFECT, observed=0, limit="at least 1 step")
            return
        if record.optimizer is not None and record.optimizer.name == "SGD":
            yield self.not_evaluated(Reason.SGD, required=False)
            return
        due = Due(record)
        told = False
        for s in effective:
            still = Names.of(due.among(s.unchanged.first, s))
            due.effective(s)
            if still and not told:
                told, limit = True, "every factor changes"
                yield self.failed(Reason.STILL_AT_STEP, step=s.step, observed=still.count, limit=limit, names=still)
        restored = record.restored
        # those of an early checkpoint may be where they began
        everything = [t for t in due.over_the_run() if not (restored and t.delta_norm == 0 and _fraction(t) > 0)]
        yield from self._over_the_run(everything)

    def _over_the_run(self, due: list[TensorRecord]) -> Iterator[Finding]:
        still = [t for t in due if not (t.delta_norm is not None and t.delta_norm > 0)]
        # AdaLoRA sets the values of the ranks that it takes away to zero, where they began
        still = [t for t in still if not (".lora_E" in t.name and _fraction(t) > 0)]
        if still:
            seen: dict[str, Any] = {"still": len(still), "due": len(due), "names": Names.of(t.name for t in still)}
            yield self.failed(Reason.STILL, observed=still[0].delta_norm, limit="> 0", **seen)
        partly = [t for t in due if t.is_factor and t not in still and not self._moved(t)]
        if partly:
            least, limit = min(partly, key=_fraction), self.min_changed_fraction
            seen = {"tensor": least.name, "partly": len(partly), "due": len(due)}
            yield self.failed(Reason.PARTLY, observed=_fraction(least), limit=limit, **seen)

    def _moved(self, tensor: TensorRecord) -> bool:
        return _fraction(tensor) >= self.min_changed_fraction


def _fraction(tensor: TensorRecord) -> float:
    return math.nan if tensor.changed_fraction is None else tensor.changed_fraction
