"""Strategies: cells, batches, healthy records, and what can be taken from them or planted in them."""

from __future__ import annotations

import math
import re
from typing import Any

from hypothesis import strategies as st

from pytest_sftguard.hardware import HardwareProfile
from pytest_sftguard.matrix import Batch, Cell
from pytest_sftguard.precision import MODES
from pytest_sftguard.records import RunRecord, numbers
from tests.support import canned

Path = tuple[Any, ...]
"""The way to a place in the plain form of a record: keys and positions."""


def non_finite() -> st.SearchStrategy[float]:
    """NaN and both infinities."""
    return st.sampled_from([math.nan, math.inf, -math.inf])


def precisions() -> st.SearchStrategy[str]:
    """Names of precision modes."""
    return st.sampled_from(list(MODES))


def batches() -> st.SearchStrategy[Batch]:
    """Per-device batches, with and without an accumulation of their own."""
    return st.builds(Batch, st.integers(1, 64), st.none() | st.integers(1, 64))


def cells() -> st.SearchStrategy[Cell]:
    """Points of the matrix, small enough to be built in no time."""
    return st.builds(Cell, precisions(), st.integers(1, 16), st.integers(1, 4))


def devices() -> st.SearchStrategy[HardwareProfile]:
    """Devices of every type; the NVIDIA ones have a compute capability."""
    types = st.sampled_from(["cpu", "mps", "xpu", "rocm"])
    others = st.builds(HardwareProfile, device_type=types, name=st.just("other"))
    capabilities = st.builds("{}.{}".format, st.integers(3, 12), st.integers(0, 9))
    cuda = st.builds(HardwareProfile, device_type=st.just("cuda"), name=st.just("GPU"), capability=capabilities)
    return others | cuda


@st.composite
def healthy_records(draw: st.DrawFn) -> RunRecord:
    """Records that pass every built-in invariant: all modes, with skipped and idle steps, with and without answers."""
    cell = draw(cells())
    mode = MODES[cell.precision]
    steps = draw(st.integers(1, 6))
    skipped = draw(st.sets(st.integers(1, steps), max_size=min(3, steps - 1))) if mode.scaler else set()
    idle = draw(st.booleans()) and steps - len(skipped) > 1
    parsed = draw(st.lists(st.floats(-1e6, 1e6), max_size=3))
    unparsed = draw(st.integers(0, len(parsed)))
    return canned.healthy(
        cell,
        steps=steps,
        skipped=skipped,
        idle=idle,
        answers=[*parsed, *[None] * unparsed],
        head=draw(st.booleans()),
        log=draw(st.booleans()),
        device=canned.H100 if mode.cuda_only else draw(st.sampled_from([canned.CPU, canned.H100])),
        # a measured loss is no round number
        values=[v * math.pi for v in draw(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8))],
    )


def float_paths(record: RunRecord) -> list[Path]:
    """The way to every float of `record`."""
    return [_steps_of(where) for where, _ in numbers(record)]


def gaps(data: Any, path: Path = ()) -> list[Path]:
    """The way to everything in the plain form of a record that can be absent: all but the containers' own roots."""
    if isinstance(data, dict):
        inner = [(k, v) for k, v in data.items() if v is not None]
    elif isinstance(data, list):
        inner = list(enumerate(data))
    else:
        return []
    return [found for key, value in inner for found in ((*path, key), *gaps(value, (*path, key)))]


def put(data: Any, path: Path, value: Any) -> None:
    """Set the place at `path` of `data` to `value`."""
    *route, last = path
    for key in route:
        data = data[key]
    data[last] = value


def remove(data: Any, path: Path) -> None:
    """Take the place at `path` out of `data`: an element out of its list, a value to None."""
    *route, last = path
    for key in route:
        data = data[key]
    if isinstance(data, list):
        del data[last]
    else:
        data[last] = None


def spelled(path: Path) -> str:
    """The path without positions: `steps[].loss`."""
    return re.sub(r"^\.", "", "".join("[]" if isinstance(key, int) else f".{key}" for key in path))


def _steps_of(where: str) -> Path:
    return tuple(int(part) if part.isdigit() else part for part in re.findall(r"[^.\[\]]+", where))
