"""Leaving no trace: global state that a training touches, put back as it was."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch

from pytest_sftguard.engine.surroundings import devices, float32


@contextlib.contextmanager
def isolated() -> Iterator[None]:
    """Put the random generators, the environment and torch's switches back at the end, also after an exception."""
    numpy_random = _numpy_random()
    state = random.getstate()
    numpy_state = numpy_random.get_state() if numpy_random else None
    environment = dict(os.environ)
    switches = (torch.get_default_dtype(), torch.is_grad_enabled())
    precisions_back, generators_back = float32.remembered(), _generators()
    try:
        yield
    finally:
        generators_back()
        precisions_back()
        random.setstate(state)
        if numpy_random and numpy_state is not None:
            numpy_random.set_state(numpy_state)
        os.environ.clear()
        os.environ.update(environment)
        torch.set_default_dtype(switches[0])
        torch.set_grad_enabled(switches[1])


def _generators() -> Callable[[], None]:
    """What puts torch's generators back; those of a device that is lost, where `fork_rng` would raise, stay."""
    host = torch.get_rng_state()
    there = torch.cuda.is_available() and devices.lost() is None
    states = torch.cuda.get_rng_state_all() if there else []

    def put_back() -> None:
        torch.set_rng_state(host)
        try:
            torch.cuda.set_rng_state_all(states)
        except RuntimeError:
            if devices.answers("cuda"):
                raise

    return put_back


def _numpy_random() -> Any:
    try:
        from numpy import random as numpy_random
    except ImportError:
        return None
    return numpy_random
