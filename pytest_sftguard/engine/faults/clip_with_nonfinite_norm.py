"""One infinite entry, and clipping rewrites the good gradients too."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_sftguard.engine.faults import Fault
from pytest_sftguard.engine.faults._training import factor, spoil_gradient

if TYPE_CHECKING:
    from transformers import Trainer


class ClipWithNonfiniteNorm(Fault):
    """clip_grad_norm_ divides by an infinite norm: zeros everywhere, and 0 * inf is NaN."""

    id = "clip-with-nonfinite-norm"
    source = "https://github.com/pytorch/pytorch/issues/46849"
    injects = "inf in one entry of one lora_B's gradient in step 3, max_grad_norm=1"
    silent = False
    reported_by: ClassVar = ("gradients_finite", "weights_and_moments_finite")
    mechanism = "nonfinite_gradient_clipped"
    step = 3
    tensor = "lora_B"
    arguments: ClassVar = {"max_grad_norm": 1.0}

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """Spoil one entry."""
        trainer = build(**arguments)
        return spoil_gradient(trainer, factor(trainer, "lora_B"), math.inf, 3)
