"""Every step overflows, the loss scale halves to nothing, and the run completes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_sftguard.engine.faults import Fault
from pytest_sftguard.engine.faults._overflow import overflow_float16

if TYPE_CHECKING:
    from transformers import Trainer


class LossScaleCollapse(Fault):
    """An overflow that no smaller scale can cure."""

    id = "loss-scale-collapse"
    source = "https://github.com/microsoft/DeepSpeed/issues/697"
    injects = "the weights of one MLP's two layers times 3e4, under a loss scaler"
    reported_by: ClassVar = ("effective_steps", "every_factor_moves", "raw_loss_finite")
    mechanism = "loss_scale_collapse"
    precision = "fp16-mixed"
    steps = 30

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """Enlarge the base."""
        return overflow_float16(build(**arguments))
