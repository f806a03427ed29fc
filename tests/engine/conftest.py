"""Running and judging one cell, for the tests of the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from pytest_sftguard.engine import runner
from pytest_sftguard.invariants import load_invariants
from pytest_sftguard.matrix import Cell, RunConfig
from pytest_sftguard.verdicts import JudgedRun, judge
from tests.targets.tiny import TINY


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Reductions differ with the number of threads, and tiny models are fastest with one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def run_cell() -> Callable[..., JudgedRun]:
    """Runs a target (of tests/targets/tiny.py, or the built-in one) in one cell on the CPU, and judges it."""

    def run(target: str = TINY, precision: str = "fp32", batch: tuple[int, int] = (8, 1), **config: Any) -> JudgedRun:
        path = target if ":" in target else f"tests.targets.tiny:{target}"
        config = {"device": "cpu", "steps": 6} | config
        record = runner.run(RunConfig(cell=Cell(precision, *batch), target=path, **config))
        return JudgedRun(record, judge(record, load_invariants()))

    return run
