"""Threads of a training: a share of the machine's cores for each worker of xdist."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from pytest_sftguard.hardware import usable_cores

_CHOSEN = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@contextlib.contextmanager
def shared_cores() -> Iterator[None]:
    """Let torch use this process's share of the cores, and restore its number of threads at the end.

    In each worker of xdist torch would use every core, and threads that compete for a core take ten times as long as
    threads with one each. Does nothing if OMP_NUM_THREADS or MKL_NUM_THREADS is set.
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
    """Cores for each worker, at least one; None outside of xdist, or if the user chose the number of threads."""
    workers = os.environ.get("PYTEST_XDIST_WORKER_COUNT", "")
    if not workers.isdecimal() or int(workers) < 2 or any(os.environ.get(name) for name in _CHOSEN):
        return None
    return max(1, usable_cores() // int(workers))
