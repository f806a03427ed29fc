"""Summary: the attempts on one target, and the rates of what was caught, located and explained."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pytest_sftguard.detection.attempts import Attempt


def beside(attempts: Sequence[Attempt], plain: Sequence[Attempt]) -> list[Attempt]:
    """`attempts` without what `plain`, the target as it is, reports too in the same precision."""
    known: dict[str, set[str]] = {}
    for a in plain:
        known.setdefault(a.precision, set()).update(a.reported)
    return [replace(a, reported=tuple(n for n in a.reported if n not in known.get(a.precision, ()))) for a in attempts]


@dataclass(frozen=True)
class Detection:
    """All attempts on one target."""

    target: str
    """Its dotted path."""
    attempts: tuple[Attempt, ...]
    """Those on the target as it is, then those of the library in its order."""
    device: str = "cpu"
    """Type of the device that was trained on, `cpu` or `cuda`."""

    @property
    def faults(self) -> list[Attempt]:
        """The attempts with a fault that must be reported."""
        return [a for a in self.attempts if not a.is_control and not a.skipped]

    @property
    def missed(self) -> list[Attempt]:
        """Those of them that were not caught."""
        return [a for a in self.faults if not a.caught]

    @property
    def false_alarms(self) -> list[Attempt]:
        """Healthy trainings of which something was reported."""
        return [a for a in self.attempts if a.false_alarm and not a.skipped]

    @property
    def sound(self) -> bool:
        """Whether there were faults, all were caught, and no healthy training was reported."""
        return bool(self.faults) and not self.missed and not self.false_alarms

    def to_dict(self) -> dict[str, Any]:
        """As plain types."""
        return {"target": self.target, "summary": self.summary(), "attempts": [a.to_dict() for a in self.attempts]}

    def summary(self) -> list[str]:
        """The rates, one a line."""
        controls = [a for a in self.attempts if a.is_control and not a.skipped]
        skipped = [a for a in self.attempts if a.skipped]
        times = [a.seconds for a in self.attempts if not a.skipped]
        lines = [
            f"detection      {_rate(a.caught for a in self.faults)}",
            f"silent ones    {_rate(a.caught for a in self.faults if a.silent)}",
            f"localisation   {_rate(a.located for a in self.faults if a.located is not None)}: step within one, tensor",
            f"mechanism      {_rate(a.explained for a in self.faults if a.explained is not None)} named first",
            f"false alarms   {len(self.false_alarms)} of {len(controls)} healthy trainings",
        ]
        if times:
            lines.append(f"seconds        {statistics.median(times):.1f} in the median, {max(times):.1f} at most")
        if skipped:
            lines.append(f"not tried      {len(skipped)}: {', '.join(a.fault for a in skipped)}")
        return lines


def _rate(outcomes: Iterable[bool | None]) -> str:
    every = [bool(outcome) for outcome in outcomes]
    return f"{sum(every)} of {len(every)}" + (f" ({sum(every) / len(every):.1%})" if every else "")
