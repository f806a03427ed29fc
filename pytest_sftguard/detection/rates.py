"""Rates with exact confidence bounds, and the size from which on something is detected."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

CONFIDENCE = 0.95
"""Confidence of the bounds, of both sides together."""


def bounds(hits: int, trials: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The exact bounds of Clopper and Pearson on the rate behind `hits` of `trials`; from 0 to 1 without a trial."""
    tail = (1 - confidence) / 2
    low = 0.0 if hits == 0 else _root(lambda p: tail - _at_least(hits, trials, p))
    high = 1.0 if hits == trials else _root(lambda p: 1 - _at_least(hits + 1, trials, p) - tail, falling=True)
    return low, high


def _at_least(hits: int, trials: int, rate: float) -> float:
    """The probability of at least so many hits."""
    if rate <= 0 or rate >= 1:
        return float(rate >= 1 or hits == 0)
    logs = (
        math.lgamma(trials + 1)
        - math.lgamma(k + 1)
        - math.lgamma(trials - k + 1)
        + k * math.log(rate)
        + (trials - k) * math.log1p(-rate)
        for k in range(hits, trials + 1)
    )
    return min(1.0, math.fsum(map(math.exp, logs)))


def _root(function: Callable[[float], float], *, falling: bool = True) -> float:
    """Where a falling function of a rate crosses zero, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (function(middle) > 0) == falling else (low, middle)
    return (low + high) / 2


def isotonic(points: Sequence[tuple[float, bool]]) -> list[tuple[float, float]]:
    """The detection rate as a function of size that never falls and fits best: (size, rate) at each size, sorted.

    By pooling adjacent violators. It assumes nothing of the shape of the curve, and needs no two classes to overlap.
    """
    sizes = sorted({size for size, _ in points})
    pools: list[list[float]] = []
    for size in sizes:
        outcomes = [hit for s, hit in points if s == size]
        pools.append([float(sum(outcomes)), float(len(outcomes)), 1.0])
        while len(pools) > 1 and pools[-2][0] * pools[-1][1] >= pools[-1][0] * pools[-2][1]:
            hits, trials, width = pools.pop()
            pools[-1] = [pools[-1][0] + hits, pools[-1][1] + trials, pools[-1][2] + width]
    rates = [hits / trials for hits, trials, width in pools for _ in range(int(width))]
    return list(zip(sizes, rates, strict=True))


def limit(points: Sequence[tuple[float, bool]], rate: float) -> float | None:
    """The smallest size at which the isotonic rate is at least `rate`; None if it is at no size."""
    return next((size for size, found in isotonic(points) if found >= rate), None)
