"""Steps of the app's training as benchmarks: by the Trainer alone, and watched, in one group for each cell.

pytest tests/benchmarks -p no:xdist --benchmark-save=before
pytest tests/benchmarks -p no:xdist --benchmark-compare --benchmark-compare-fail=median:10%
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pytest_sftguard.benchmarking import hand_over
from pytest_sftguard.matrix import Cell, RunConfig

STEPS, WARM_UP = 8, 2
CELLS = [Cell(precision, rows, 8 // rows) for precision in ("fp32", "bf16-mixed") for rows in (2, 8)]
TARGET = "homework.sft:build_trainer"


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_a_step_by_the_trainer_alone(cell: Cell, benchmark: Any, tmp_path: Path) -> None:
    """What the guard's own is to be compared with."""
    from pytest_sftguard.engine.surroundings.isolation import isolated
    from tools.benchmarks.turns import alone

    with isolated():
        times = alone(RunConfig(cell=cell, target=TARGET, device="cpu", steps=STEPS), tmp_path, warm_up=WARM_UP)
    assert len(times.wall) == STEPS - WARM_UP
    benchmark.group = f"step of {cell}"
    hand_over(benchmark, times.wall)


@pytest.mark.gpu_stability(
    target=TARGET, precision=["fp32", "bf16-mixed"], batch=["2x4", "8x1"], steps=STEPS, device="cpu"
)
def test_a_step_that_is_watched(sft_run: Any, benchmark: Any) -> None:
    """The same training under the guard."""
    assert len(sft_run.step_seconds) == STEPS
    benchmark.group = f"step of {sft_run.record.cell}"
    sft_run.benchmark_steps(benchmark, warm_up=WARM_UP)
