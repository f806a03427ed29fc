"""A target with a fault in it, found by its dotted path like every other target.

Environment variables name the fault and the target, so that the processes that the guard starts have it too.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from pytest_sftguard.engine.building.targets import Target, resolve
from pytest_sftguard.engine.faults import fault_named

PATH = f"{__name__}:build_trainer"
"""Dotted path of the target with the fault in it."""

_FAULT, _TARGET = "SFTGUARD_FAULT", "SFTGUARD_FAULT_TARGET"
_current: list[Target] = []
# Holds the fault of a process that the guard started: a generator that nobody holds is closed
_held = contextlib.ExitStack()


@contextlib.contextmanager
def injected(fault: str, target: str) -> Iterator[str]:
    """Yield the dotted path of `target` with `fault` in it, which it has until the context ends."""
    with fault_named(fault).inject(resolve(target)) as faulty:
        _current.append(faulty)
        os.environ[_FAULT], os.environ[_TARGET] = fault, target
        try:
            yield PATH
        finally:
            _current.pop()
            del os.environ[_FAULT], os.environ[_TARGET]


def build_trainer(**arguments: Any) -> Any:
    """The faulty Trainer."""
    return _faulty().build(**arguments)


def __getattr__(name: str) -> Any:
    """`questions`, `parse_answer` and whatever else a target's module may offer, as the fault leaves it."""
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(_faulty(), name)


def _faulty() -> Target:
    # A process that the guard started: the fault stays until the process ends
    if not _current:
        _held.enter_context(injected(os.environ[_FAULT], os.environ[_TARGET]))
    return _current[-1]
