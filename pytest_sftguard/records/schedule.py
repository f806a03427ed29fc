"""What the learning rate should have been."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ScheduleRecord:
    """The schedule of the first parameter group, computed apart from the training."""

    name: str
    """Class of the scheduler."""
    rates: tuple[float, ...] = ()
    """Learning rate of each effective step, as many as optimizer steps were asked for."""
    unknown: str = ""
    """Why the rates cannot be foretold, such as a scheduler that follows a metric; empty where they can."""
