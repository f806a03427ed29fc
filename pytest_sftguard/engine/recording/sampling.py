"""Which steps are looked at closely: what costs more than all other numbers of a step together is asked of a few."""

from __future__ import annotations

_FIRST, _EVERY = (1, 2, 3, 4, 8), 16


def sampled(step: int) -> bool:
    """Whether `step`, from 1, is one of the first four, the eighth or every sixteenth, since few faults pass."""
    return step in _FIRST or step % _EVERY == 0
