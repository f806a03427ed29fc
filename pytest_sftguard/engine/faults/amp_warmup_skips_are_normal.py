"""The first steps under a loss scaler have NaN norms and change nothing: healthy."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pytest_sftguard.engine.faults import Fault
from pytest_sftguard.engine.faults._training import largest_scale, start_scale

if TYPE_CHECKING:
    from transformers import Trainer


class AmpWarmupSkipsAreNormal(Fault):
    """A loss scale that begins two halvings too high."""

    id = "amp-warmup-skips-are-normal"
    source = "https://github.com/huggingface/transformers/pull/11144"
    injects = "GradScaler that begins at four times what the first batch bears"
    precision = "fp16-mixed"
    silent = False

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """Find out what fits, and begin above it."""
        trainer = build(**arguments)
        return start_scale(trainer, lambda: 4 * largest_scale(trainer))
