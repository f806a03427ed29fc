"""A target that has a fault in it, found by its dotted path like every other.

Which fault and which target is said in environment variables, so that a process that the guard starts has it too.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from pytest_sftguard import registry
from pytest_sftguard.engine.building.targets import Target, resolve

PATH = f"{__name__}:build_trainer"
"""Dotted path of the target that has a fault in it."""

_FAULT, _TARGET = "SFTGUARD_FAULT", "SFTGUARD_FAULT_TARGET"
_current: list[Target] = []
_held = contextlib.ExitStack()  # a generator that nobody holds is closed, and the fault with it


@contextlib.contextmanager
def injected(fault: str, target: str) -> Iterator[str]:
    """While this is active, the dotted path that it gives leads to `target` with `fault` in it."""
    from pytest_sftguard.engine import faults

    with registry.load(fault, faults.__name__)().inject(resolve(target)) as faulty:
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
    """`questions`, `parse_answer` and what else a target's module may offer, as the fault leaves it."""
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(_faulty(), name)


def _faulty() -> Target:
    if not _current:  # a process of the guard's own: the fault stays until it ends
        manager = injected(os.environ[_FAULT], os.environ[_TARGET])
        _held.enter_context(manager)
    return _current[-1]
