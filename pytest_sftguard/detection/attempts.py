"""Attempts: one fault in one training, and what the guard said of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

HEALTHY = "(none)"
"""Stands for the id of a fault where the target is trained as it is."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One fault, and what the guard said of it."""

    fault: str
    """Its id; HEALTHY for the target as it is."""
    source: str = ""
    """URL of a report by somebody who met it."""
    injects: str = ""
    """What it does to the training."""
    cell: str = ""
    """Cell that was trained."""
    precision: str = ""
    """Precision of that cell."""
    expected: tuple[str, ...] = ()
    """Invariants of which at least one must report it; empty if none may report anything."""
    reported: tuple[str, ...] = ()
    """Invariants that reported something."""
    step: int | None = None
    """First optimizer step that it affects; None if no step stands out."""
    seen_at: int | None = None
    """First step that a finding names."""
    tensor: str = ""
    """Part of the name of the tensor that a finding must name."""
    pointed: bool = False
    """Whether a finding names such a tensor."""
    mechanism: str = ""
    """Name of the mechanism that the diagnosis must put first."""
    named: tuple[str, ...] = ()
    """Names of the mechanisms in the diagnosis, the most probable first."""
    silent: bool = False
    """Whether every line of the log looks acceptable."""
    seconds: float = 0.0
    """Wall time of the training and of its references."""
    message: str = ""
    """The first finding."""
    skipped: str = ""
    """Why the fault could not be injected into this target; empty if it could."""

    @property
    def is_control(self) -> bool:
        """Whether this is a healthy training, of which nothing may be reported."""
        return not self.expected

    @property
    def caught(self) -> bool:
        """Whether one of the expected invariants reported it."""
        return bool(set(self.expected) & set(self.reported))

    @property
    def false_alarm(self) -> bool:
        """Whether something was reported of a healthy training."""
        return self.is_control and bool(self.reported)

    @property
    def late(self) -> int | None:
        """Steps from the first affected step to the first one that a finding names; None if either is unknown."""
        return None if self.step is None or self.seen_at is None else self.seen_at - self.step

    @property
    def located(self) -> bool | None:
        """Whether the findings name its step, or the next one, and its tensor; None if neither stands out."""
        if self.step is None and not self.tensor:
            return None
        in_time = self.step is None or (self.late is not None and 0 <= self.late <= 1)
        return in_time and (not self.tensor or self.pointed)

    @property
    def explained(self) -> bool | None:
        """Whether the right mechanism came first; None for a control."""
        return self.named[:1] == (self.mechanism,) if self.mechanism else None

    def to_dict(self) -> dict[str, Any]:
        """As plain types, with the derived properties."""
        derived = {n: getattr(self, n) for n in ("caught", "false_alarm", "late", "located", "explained")}
        return asdict(self) | derived
