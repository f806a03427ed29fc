"""Garbage collection within a cell: of the objects that the cell makes, not of everything that the process imported."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def set_aside(device_type: str) -> Iterator[None]:
    """Exclude every existing object from garbage collection, and collect what was made within at the end.

    A process that trains has a million objects, most of them of imported modules, and accelerate collects garbage
    before each training. That takes a quarter of a second on a CPU, as long as several steps of a small model. Objects
    that are already garbage stay until the cell ends; on other devices, whose memory is scarce, they are collected
    first. Does nothing if somebody else has called `gc.freeze`.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.collect(1 if device_type == "cpu" else 2)
    gc.freeze()
    try:
        yield
    finally:
        gc.collect()
        gc.unfreeze()
