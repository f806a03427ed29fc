"""Step times of a training for pytest-benchmark: its tables, `--benchmark-save` and `--benchmark-compare-fail`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any


def hand_over(benchmark: Any, seconds: Sequence[float]) -> None:
    """Let the `benchmark` fixture of pytest-benchmark record `seconds`, one round for each, as if it had timed them.

    The rounds have been; they are played back to its clock. Nothing happens under `--benchmark-disable`. Raises
    TypeError for what is no such fixture, ValueError where there are no seconds.
    """
    if not hasattr(benchmark, "pedantic") or not hasattr(benchmark, "_timer"):
        raise TypeError(f"expected pytest-benchmark's fixture `benchmark`, not {type(benchmark).__name__}")
    if not seconds:
        raise ValueError("there is no step to hand to benchmark: the training took none, or all were left out")
    clock = _played_back(seconds)
    real, benchmark._timer = benchmark._timer, lambda: next(clock)  # a test chooses its trainings, not its timer
    try:
        benchmark.pedantic(lambda: None, rounds=len(seconds), iterations=1)
    finally:
        benchmark._timer = real


def _played_back(seconds: Sequence[float]) -> Iterator[float]:
    """Beginning and end of each round on a clock that only they move, exact to the last digit."""
    return itertools.chain.from_iterable((0.0, duration) for duration in seconds)
