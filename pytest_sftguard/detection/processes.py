"""Processes: attempts and trials are made in fresh ones, several at a time."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any, TypeVar

T = TypeVar("T")

Task = tuple[Callable[..., T], tuple[Any, ...]]
"""A function that can be pickled, and its arguments."""


def run_all(tasks: Sequence[Task[T]], jobs: int, done: Callable[[T], object]) -> list[T]:
    """The results of `tasks`, such as attempts, in their order, made in `jobs` fresh processes of one thread each.

    `done` is called with each result as it ends. What the trainings print goes to a file, so that the terminal stays
    readable. An exception in one task ends all. If a process loses its CUDA device to a task, new processes go on.
    """
    found: dict[int, T] = {}
    while len(found) < len(tasks):
        left = {place: task for place, task in enumerate(tasks) if place not in found}
        found |= _run_some(left, min(jobs, len(left)), done)
    return [found[place] for place in range(len(tasks))]


def _run_some(tasks: dict[int, Task[T]], jobs: int, done: Callable[[T], object]) -> dict[int, T]:
    """The results of those `tasks` that were given to a process with a device; at least one for each process."""
    found: dict[int, T] = {}
    # torch's threads do not survive a fork
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_quiet) as pool:
        futures = {pool.submit(_unless_lost, function, arguments): p for p, (function, arguments) in tasks.items()}
        try:
            for future in as_completed(futures):
                result = future.result()
                if result is not None:
                    found[futures[future]] = result
                    done(result)
        except BaseException:
            # the block shuts it down once more: without waiting here, that would take the cancelling back
            pool.shutdown(cancel_futures=True)
            raise
    return found


def _unless_lost(function: Callable[..., T], arguments: tuple[Any, ...]) -> T | None:
    """One result; None in a process that has lost its device."""
    from pytest_sftguard.engine.surroundings import devices

    return function(*arguments) if devices.answers("cuda") else None


def _quiet() -> None:
    """Set up a process for attempts: one thread, and nothing on the terminal."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # It lives as long as the process
    log = tempfile.TemporaryFile()  # noqa: SIM115
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    warnings.simplefilter("ignore")
