"""Leaving no trace: global state that a training touches, put back as it was."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def isolated() -> Iterator[None]:
    """Put the random generators, the environment and torch's switches back at the end, also after an exception."""
    numpy_random = _numpy_random()
    state = random.getstate()
    numpy_state = numpy_random.get_state() if numpy_random else None
    environment = dict(os.environ)
    switches = (torch.get_default_dtype(), torch.is_grad_enabled())
    tf32 = (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(state)
        if numpy_random and numpy_state is not None:
            numpy_random.set_state(numpy_state)
        os.environ.clear()
        os.environ.update(environment)
        torch.set_default_dtype(switches[0])
        torch.set_grad_enabled(switches[1])
        if torch.cuda.is_available():
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32


def _numpy_random() -> Any:
    try:
        from numpy import random as numpy_random
    except ImportError:
        return None
    return numpy_random
