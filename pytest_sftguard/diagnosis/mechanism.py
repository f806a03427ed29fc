"""Mechanism: one entry of the table of causes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pytest_sftguard.diagnosis.case import Case, Clue


@dataclass(frozen=True)
class Mechanism:
    """One way in which a training fails."""

    name: str
    """Its name."""
    summary: str
    """What happens, in one sentence."""
    cure: str
    """The change that removes it."""
    look: Callable[[Case], list[Clue]]
    """Gives the clues for and against it; without enough evidence the mechanism is not named."""
    locates: bool = False
    """Whether it names the station of the training at fault and no more, so that any other mechanism goes first."""
