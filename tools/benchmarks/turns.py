"""Trainings that take turns, step by step: what slows the machine down for a moment slows all of them down.

Rounds of whole trainings, one after the other, differ by some percent from each other on a machine that is shared;
neighbouring steps do not. Every training has a thread of its own, and only the one whose turn it is runs.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from pytest_sftguard.engine.building.targets import resolve
from pytest_sftguard.engine.building.trainers import build
from pytest_sftguard.matrix import RunConfig
from pytest_sftguard.precision import mode_named


@dataclass
class Times:
    """Seconds of the counted steps of one training."""

    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)


class Turns:
    """A ring of trainings; each does one step and hands over. The order of a lap is drawn anew for each lap.

    The first `warm_up` steps of each are not counted. `within` makes, by name, a context that is entered for each turn;
    `settle` is called before a turn is over.
    """

    def __init__(
        self,
        names: list[str],
        *,
        warm_up: int,
        within: Mapping[str, Callable[[], Any]] | None = None,
        settle: Callable[[], None] = lambda: None,
        seed: int = 0,
    ) -> None:
        self.times = {name: Times() for name in names}
        self.within = dict(within or {})
        self.warm_up, self.settle = warm_up, settle
        self._draw = random.Random(seed)
        self._changed = threading.Condition()
        self._running = list(names)
        self._lap = list(names)
        self._failures: list[BaseException] = []

    def run(self, trainings: Mapping[str, Callable[[TrainerCallback], None]]) -> dict[str, Times]:
        """Run all `trainings`, each of them given the callback that it must add to its Trainer."""
        threads = [
            threading.Thread(target=self._train, args=(name, training), name=name)
            for name, training in trainings.items()
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._failures:
            raise self._failures[0]
        return self.times

    def _train(self, name: str, training: Callable[[TrainerCallback], None]) -> None:
        self._wait(name)
        try:
            training(_Turn(self, name))
        except BaseException as error:
            # raised in the thread that waits for all
            self._failures.append(error)
        finally:
            with self._changed:
                self._running.remove(name)
                self._next()

    def _wait(self, name: str) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._lap[0] == name)

    def _next(self) -> None:
        """The head of the lap has had its turn."""
        self._lap = [n for n in self._lap[1:] if n in self._running]
        if not self._lap:
            self._lap = self._draw.sample(self._running, len(self._running))
        self._changed.notify_all()

    def hand_over(self, name: str) -> None:
        """The step of `name` is over; comes back when it is its turn again."""
        with self._changed:
            self._next()
        self._wait(name)


class _Turn(TrainerCallback):
    """Times the steps of one training, from its turn's beginning to the step's end."""

    def __init__(self, turns: Turns, name: str) -> None:
        self._turns, self._name = turns, name
        self._stack = contextlib.ExitStack()
        self._steps = 0
        self._begin()

    def _begin(self) -> None:
        self._stack.enter_context(self._turns.within.get(self._name, contextlib.nullcontext)())
        self._began = time.perf_counter(), time.process_time()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """A step is over."""
        self._turns.settle()
        wall, processor = time.perf_counter() - self._began[0], time.process_time() - self._began[1]
        self._stack.close()
        self._steps += 1
        if self._steps > self._turns.warm_up:
            times = self._turns.times[self._name]
            times.wall.append(wall)
            times.processor.append(processor)
        self._turns.hand_over(self._name)
        self._begin()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """No step follows."""
        self._stack.close()


class _Clock(TrainerCallback):
    """Times the steps of a training that has the machine to itself."""

    def __init__(self) -> None:
        self.times = Times()

    def _now(self) -> None:
        self.wall, self.processor = time.perf_counter(), time.process_time()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """The first step begins."""
        self._now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """A step is over."""
        self.times.wall.append(time.perf_counter() - self.wall)
        self.times.processor.append(time.process_time() - self.processor)
        self._now()


def alone(config: RunConfig, folder: Path, *, warm_up: int = 0) -> Times:
    """The steps of one training by the Trainer alone, on a CPU; what it writes goes to `folder`.

    It runs in the thread that asks: in another one torch would start a second set of worker threads beside the first.
    """
    trainer = build(resolve(config.target), config, mode_named(config.cell.precision), "cpu", folder)
    trainer.log = lambda *_, **__: None
    clock = _Clock()
    trainer.add_callback(clock)
    trainer.train()
    return Times(clock.times.wall[warm_up:], clock.times.processor[warm_up:])
