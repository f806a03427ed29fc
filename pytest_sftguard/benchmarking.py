"""Step times of a training for pytest-benchmark: its tables, `--benchmark-save` and `--benchmark-compare-fail`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any


def hand_over(benchmark: Any, seconds: Sequence[float]) -> None:
    """Make the `benchmark` fixture of pytest-benchmark record `seconds`, one round for each, as if it had timed them.

    A replacement for the fixture's clock replays them. Does nothing under `--benchmark-disable`. Raises TypeError if
    `benchmark` is not such a fixture, ValueError if `seconds` is empty.
    """
    if not hasattr(benchmark, "pedantic") or not hasattr(benchmark, "_timer"):
        raise TypeError(f"expected pytest-benchmark's fixture `benchmark`, not {type(benchmark).__name__}")
    if not seconds:
        raise ValueError("there is no step to hand to benchmark: the training took none, or all were left out")
    # every round begins at 0, so that its duration is exact to the last digit
    clock = itertools.chain.from_iterable((0.0, duration) for duration in seconds)
    # a test chooses its trainings, not its timer
    real, benchmark._timer = benchmark._timer, lambda: next(clock)
    try:
        benchmark.pedantic(lambda: None, rounds=len(seconds), iterations=1)
    finally:
        benchmark._timer = real
