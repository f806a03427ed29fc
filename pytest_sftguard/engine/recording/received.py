"""What becomes of gradients between the backward pass and the optimizer: all of them may be scaled alike, no more."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

_FLOAT16 = 6e-6
"""Size of an element below which gradients in float16 are too coarse to compare: 100 times its smallest number."""


@dataclass(frozen=True)
class Parting:
    """The tensor whose gradient changed most, beyond the factor that all have in common."""

    tensor: str
    """Its name."""
    share: float
    """How far its norm, or the sum of its elements under fixed random signs, is off, relative to its norm."""
    factor: float
    """The common factor: 1 without clipping."""


def parting(
    names: Sequence[str],
    dtypes: Sequence[torch.dtype],
    elements: Sequence[int],
    left: Sequence[tuple[float, float]],
    given: Sequence[tuple[float, float]],
) -> Parting | None:
    """Compare norms and signed sums after the backward pass, `left`, with those that the optimizer was `given`.

    None if no gradient is there, or a number is not finite: a step that the loss scaler skips.
    """
    pairs = list(zip(left, given, strict=True))
    ratios = [after[0] / before[0] for before, after in pairs if before[0] > 0]
    if not ratios or not all(math.isfinite(x) for pair in pairs for numbers in pair for x in numbers):
        return None
    factor = statistics.median(ratios)
    worst = Parting("", 0.0, factor)
    for name, dtype, count, (before, after) in zip(names, dtypes, elements, pairs, strict=True):
        coarse = _FLOAT16 * math.sqrt(count) if dtype is torch.float16 else 0.0
        size = factor * before[0] + coarse
        apart = max(abs(new - factor * old) for old, new in zip(before, after, strict=True))
        share = apart / size if size > 0 else math.inf if apart > 0 else 0.0
        if share > worst.share:
            worst = Parting(name, share, factor)
    return worst
