"""An engine that trains nothing: it hands out canned records, and remembers what it was asked for."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from pytest_sftguard import engine
from pytest_sftguard.engine import building
from pytest_sftguard.matrix import RunConfig
from pytest_sftguard.records import RunRecord
from tests.support import canned


class TargetError(Exception):
    """Stands for the engine's own."""


class Engine:
    """Stands for the engine: `make` turns a config into its record."""

    def __init__(self, make: Callable[[RunConfig], RunRecord] = canned.of) -> None:
        self.make = make
        self.ran: list[str] = []

    def run(self, config: RunConfig, progress: Any = None) -> RunRecord:
        """The record of `config`, after telling `progress` of each step."""
        self.ran.append(str(config.cell))
        if progress is not None:
            for step in range(1, config.steps + 1):
                progress(step)
        return self.make(config)


def install(make: Callable[[RunConfig], RunRecord] = canned.of, put: Callable[..., None] = setattr) -> Engine:
    """Put an Engine in the place of the real one, with `put`; nothing of torch is imported."""
    stub = Engine(make)
    put(engine, "runner", SimpleNamespace(run=stub.run))
    put(building, "targets", SimpleNamespace(TargetError=TargetError))
    return stub
