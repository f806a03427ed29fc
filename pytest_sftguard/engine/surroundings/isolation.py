"""Leaving no trace: the global state that a training changes, restored afterwards."""

from __future__ import annotations

import contextlib
import os
import random
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import torch

from pytest_sftguard.engine.surroundings import devices, float32

_BETWEEN_LIBRARIES = (
    # peft 0.21 asks every model by the name that transformers 5.23 has replaced
    ("`is_gradient_checkpointing` is deprecated", FutureWarning, r"transformers\.modeling_utils"),
    # peft says so of every adapter on embeddings that is saved, which is the guard's doing
    ("Setting `save_embedding_layers` to `True`", UserWarning, r"peft\.utils\.save_and_load"),
)
"""Warnings that are meant for one of the libraries or for the guard: how they begin, their class, and their module."""


@contextlib.contextmanager
def isolated() -> Iterator[None]:
    """Restore generators, environment, warning filters and torch's switches at the end, also after an exception.

    Warnings of `_BETWEEN_LIBRARIES` are not shown; every other one is.
    """
    state, numpy_state, environment = random.getstate(), np.random.get_state(), dict(os.environ)
    dtype, gradients = torch.get_default_dtype(), torch.is_grad_enabled()
    restore_precisions, restore_generators = float32.snapshot(), _generators()
    try:
        with warnings.catch_warnings():
            for begin, category, module in _BETWEEN_LIBRARIES:
                warnings.filterwarnings("ignore", begin, category, module)
            yield
    finally:
        restore_generators()
        restore_precisions()
        random.setstate(state)
        np.random.set_state(numpy_state)
        os.environ.clear()
        os.environ.update(environment)
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(gradients)


def _generators() -> Callable[[], None]:
    """Return a function that restores torch's generators, but for those of a lost device, where `fork_rng` raises."""
    host = torch.get_rng_state()
    there = torch.cuda.is_available() and devices.lost() is None
    states = torch.cuda.get_rng_state_all() if there else []

    def restore() -> None:
        torch.set_rng_state(host)
        try:
            torch.cuda.set_rng_state_all(states)
        except RuntimeError:
            if devices.answers("cuda"):
                raise

    return restore
