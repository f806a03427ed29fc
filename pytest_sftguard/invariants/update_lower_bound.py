"""B6: the tensors went as far as the same steps take them in float32."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard.records import ReplayRecord, RunRecord
from pytest_sftguard.verdicts import Finding, Invariant


@dataclass(frozen=True, kw_only=True)
class UpdateLowerBound(Invariant):
    """The sum of a tensor's updates has the norm that a float32 replay of the same gradients has, within a factor."""

    max_factor: float = 2.0
    """How many times longer or shorter the way may be. Measured: 1 in float32, to 5 digits; 2.1 and more where bfloat16
    swallows updates (0.036 for 0.077), 40 and more where float16 stores Adam's second moment as 0."""

    code: ClassVar[str] = "B6"

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Compare each tensor over the whole run, and name the step at which the first one was off."""
        replay = record.replay
        if replay is None:
            yield self.not_looked(record, "replay")
            return
        if record.optimizer is None or record.optimizer.owns_trainables:
            lacking = {t.name for t in record.adapter} - {t.name for t in replay.tensors}
            if lacking or not replay.tensors:
                yield self.not_evaluated(f"{len(lacking)} tensors were not replayed", required=True)
        taken = sum(not (s.scale_fell and not s.changed) for s in record.steps)
        if len(replay.steps) != taken:
            yield self.not_evaluated(f"{len(replay.steps)} of {taken} steps were replayed", required=True)
        yield from self._off(replay)

    def _off(self, replay: ReplayRecord) -> Iterator[Finding]:
        off = [t for t in replay.tensors if not self._agrees(t.update_norm, t.replay_norm)]
        if not off:
            return
        first = next((s for s in replay.steps if not self._agrees(s.update_norm, s.replay_norm)), None)
        worst = max(off, key=lambda t: _apart(t.update_norm, t.replay_norm))
        name, shown = (first.tensor, first) if first else (worst.name, worst)
        when = "" if first is None else f" by step {first.step}"
        yield self.failed(
            f"the updates of {name} add up to {shown.update_norm:.3g}{when}, those of {replay.optimizer} in float32"
            f" to {shown.replay_norm:.3g} ({len(off)} of {len(replay.tensors)} tensors are off at the end)",
            step=None if first is None else first.step, observed=_ratio(shown.update_norm, shown.replay_norm),
            limit=f"within a factor {self.max_factor:g}",
        )  # fmt: skip

    def _agrees(self, moved: float, replayed: float) -> bool:
        if moved == replayed == 0:
            return True
        return 0 < moved < math.inf and 0 < replayed < math.inf and _apart(moved, replayed) <= self.max_factor


def _apart(moved: float, replayed: float) -> float:
    low, high = min(moved, replayed), max(moved, replayed)
    return high / low if low > 0 else math.inf


def _ratio(moved: float, replayed: float) -> float:
    return moved / replayed if replayed > 0 else math.inf
