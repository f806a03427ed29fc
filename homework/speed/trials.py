"""Forward passes that try something on a model before its training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def trial(model: Any) -> Iterator[None]:
    """Switch to evaluation mode without gradients; restore modes and random state afterwards."""
    training = [(module, module.training) for module in model.modules()]
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        model.eval()
        try:
            yield
        finally:
            for module, mode in training:
                module.training = mode
