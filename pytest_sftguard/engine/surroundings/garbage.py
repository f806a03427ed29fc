"""Garbage collection within a cell: over what the cell makes, and not over everything that the process has imported."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def set_aside(device_type: str) -> Iterator[None]:
    """Let collections pass over every object that is there now; collect what was made within, at the end.

    A process that trains holds a million objects, modules for the most part, and accelerate collects garbage before
    each training: a quarter of a second on a CPU, as long as several steps of a small model. What is garbage already
    when the cell begins stays until it ends; on a device other than the CPU, whose memory is scarce, it is
    collected first. Somebody who has set objects aside himself (`gc.freeze`) is not disturbed.
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
