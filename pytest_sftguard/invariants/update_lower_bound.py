"""B6: the tensors went as far as the same steps take them in float32."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from pytest_sftguard import verdicts
from pytest_sftguard.records import Names, ReplayRecord, RunRecord
from pytest_sftguard.verdicts import Finding, Invariant


class Reason(verdicts.Reason):
    """What the replay lacks, or where the training parts from it."""

    NO_TENSORS = "no tensor was replayed"
    FEWER_TENSORS = "the replay lacks {count:# tensor}: {names}"
    FEWER_STEPS = "the replay has {replayed} of {steps:# step}"
    APART = (
        "the updates of {tensor} add up to {moved:.3g}[[ by step {step}]], those of {optimizer} in float32 to"
        " {replayed:.3g} ({off} of {total:# tensor} off at the end)"
    )


@dataclass(frozen=True, kw_only=True)
class UpdateLowerBound(Invariant):
    """The sum of a tensor's updates has the norm that a float32 replay of the same gradients has, within a factor."""

    max_factor: float = 2.0
    """How many times longer or shorter the way may be. Measured: 1 in float32, to 5 digits; 2.1 and more where bfloat16
    swallows updates (0.036 for 0.077), 40 and more where float16 stores Adam's second moment as 0."""

    code: ClassVar[str] = "B6"

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Compare each tensor over the whole run, and name the step at which the first one was off."""
        if (replay := record.replay) is None:
            yield self.not_looked(record, "replay")
            return
        if record.optimizer is None or record.optimizer.owns_trainables:
            lacking = Names.of(sorted({t.name for t in record.adapter} - {t.name for t in replay.tensors}))
            if lacking:
                yield self.not_evaluated(Reason.FEWER_TENSORS, count=lacking.count, names=lacking)
            elif not replay.tensors:
                yield self.not_evaluated(Reason.NO_TENSORS)
        taken = sum(not (s.scale_fell and not s.changed) for s in record.steps)
        if len(replay.steps) != taken:
            yield self.not_evaluated(Reason.FEWER_STEPS, replayed=len(replay.steps), steps=taken)
        yield from self._off(replay)

    def _off(self, replay: ReplayRecord) -> Iterator[Finding]:
        off = [t for t in replay.tensors if not self._agrees(t.update_norm, t.replay_norm)]
        if not off:
            return
        first = next((s for s in replay.steps if not self._agrees(s.update_norm, s.replay_norm)), None)
        worst = max(off, key=lambda t: _apart(t.update_norm, t.replay_norm))
        name, step, shown = (first.tensor, first.step, first) if first else (worst.name, None, worst)
        moved, replayed = shown.update_norm, shown.replay_norm
        ratio, limit = moved / replayed if replayed > 0 else math.inf, f"within a factor {self.max_factor:g}"
        seen: dict[str, Any] = {"tensor": name, "moved": moved, "replayed": replayed, "optimizer": replay.optimizer}
        seen |= {"off": len(off), "total": len(replay.tensors)}
        yield self.failed(Reason.APART, step=step, observed=ratio, limit=limit, **seen)

    def _agrees(self, moved: float, replayed: float) -> bool:
        if moved == replayed == 0:
            return True
        return 0 < moved < math.inf and 0 < replayed < math.inf and _apart(moved, replayed) <= self.max_factor


def _apart(moved: float, replayed: float) -> float:
    low, high = min(moved, replayed), max(moved, replayed)
    return high / low if low > 0 else math.inf
