"""Threads of a training: the cores of the machine, shared with the workers of xdist that train beside it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from pytest_sftguard.hardware import usable_cores

_CHOSEN = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@contextlib.contextmanager
def shared_cores() -> Iterator[None]:
    """Let torch use this process's share of the cores, and put its number of threads back at the end.

    In each worker of xdist torch would take every core, and threads that wait for each other's cores take ten times as
    long as those that have one each. Whoever sets OMP_NUM_THREADS or MKL_NUM_THREADS has chosen, and is left alone.
    """
    before = torch.get_num_threads()
    share = _share()
    if share is None or share >= before:
        yield
        return
    torch.set_num_threads(share)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _share() -> int | None:
    """Cores for each worker, at least one; None where this process is alone, or its threads were chosen."""
    workers = os.environ.get("PYTEST_XDIST_WORKER_COUNT", "")
    if not workers.isdecimal() or int(workers) < 2 or any(os.environ.get(name) for name in _CHOSEN):
        return None
    return max(1, usable_cores() // int(workers))
