"""Memory sizes: parsing and formatting them, and what fits into how much."""

from __future__ import annotations

import re
from collections.abc import Callable

DEFAULT_MARGIN = 0.1
"""Share of the free memory that is left unused, for fragmentation and errors of the prediction."""

_UNITS = {"b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "kb": 10**3, "mb": 10**6, "gb": 10**9}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)", re.ASCII | re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """Parse `15.8GiB`, `16 GB`, `512MiB` or a plain number of bytes. Raises ValueError for anything else."""
    match = _SIZE.fullmatch(text.strip())
    unit = match[2].lower() or "b" if match else ""
    if match is None or unit not in _UNITS:
        raise ValueError("give a size of memory: a number and B, KiB, MiB, GiB, TiB, KB, MB or GB")
    return int(float(match[1]) * _UNITS[unit])


def format_bytes(size: int) -> str:
    """Format a size for a person: `23.1 GiB`, `512 MiB`, `7 B`."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if size >= _UNITS[unit.lower()]:
            number = size / _UNITS[unit.lower()]
            return f"{number:.0f} {unit}" if number >= 100 or number == int(number) else f"{number:.1f} {unit}"
    return f"{size} B"


def fits(need: int, free: int, margin: float) -> bool:
    """Whether `need` bytes fit into `free` bytes, of which the share `margin` is left unused."""
    return need <= free * (1 - margin)


def shortage(need: int, free: int, margin: float) -> str | None:
    """Why `need` bytes do not fit, as `needs 23.1 GiB of 15.8 GiB free`; None if they do."""
    if fits(need, free, margin):
        return None
    return f"needs {format_bytes(need)} of {format_bytes(free)} free, of which {margin:.0%} is left as a margin"


def largest(peak: Callable[[int], int], budget: float, limit: int) -> int:
    """Return the largest number from 1 to `limit` whose `peak` is within `budget`; 0 if there is none.

    `peak` must not fall as its argument grows. It is called rarely: memory grows almost linearly with the batch, so
    that a line through two known peaks gives the first guesses, and bisection only the rest.
    """
    low, high = 0, limit + 1
    known: dict[int, int] = {}
    for attempt in range(2 * limit.bit_length() + 8):
        if high - low == 1:
            break
        guess = _guess(known, budget) if attempt < 6 else (low + high) // 2
        guess = min(max(guess, low + 1), high - 1)
        known[guess] = peak(guess)
        if known[guess] <= budget:
            low = guess
        else:
            high = guess
    return low


def _guess(known: dict[int, int], budget: float) -> int:
    if len(known) < 2:
        return len(known) + 1
    (one, first), (other, second) = sorted(known.items())[-2:]
    slope = (second - first) / (other - one)
    return int(one + (budget - first) / slope) if slope > 0 else 2 * other
