"""The record of a checkpoint that was saved and loaded: what the optimizer and the schedule were given back."""

from __future__ import annotations

from dataclasses import dataclass

from pytest_sftguard.records.tensors import NONE, Names


@dataclass(frozen=True, kw_only=True)
class CheckpointRecord:
    """State of optimizer, schedule and loss scaler after loading, compared with what was saved."""

    optimizer: str
    """Class of the optimizer."""
    size_bytes: int = 0
    """Size of its state."""
    tensors: int = 0
    """Number of state tensors that were compared bit for bit."""
    changed: Names = NONE
    """Those that were loaded with other bits or another shape, as `parameter:state`."""
    worst: str = ""
    """The one that is farthest from what was saved."""
    distance: float | None = None
    """Its distance, relative to the norm of what was saved; None if nothing changed, or if the shape did."""
    expected: float | None = None
    """Its element that changed the most, as it was saved."""
    got: float | None = None
    """The same element, as it was loaded."""
    lost: Names = NONE
    """States that were not loaded at all."""
    added: Names = NONE
    """States that were loaded without having been saved."""
    narrowed: Names = NONE
    """States that torch itself rounds on loading, to the type of their parameter."""
    unread: Names = NONE
    """States whose class has no bits to compare."""
    values: int = 0
    """Number of compared values that are no tensors: options of the groups, the schedule's and the scaler's state."""
    other_values: Names = NONE
    """Those that were loaded as something else, such as `lr of group 0` or `last_epoch of the schedule`."""
    other_expected: str = ""
    """The first of them as it was saved."""
    other_got: str = ""
    """The same value as it was loaded."""
