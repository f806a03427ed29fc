"""Activations beyond 65504: infinite in float16, well in bfloat16 and float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_sftguard.engine.faults import Fault
from pytest_sftguard.engine.faults._overflow import overflow_float16

if TYPE_CHECKING:
    from transformers import Trainer


class Fp16ForwardOverflow(Fault):
    """An MLP whose product leaves the range of float16, as of models that were trained in bfloat16."""

    id = "fp16-forward-overflow"
    source = "https://github.com/huggingface/transformers/issues/5651"
    injects = "the weights of one MLP's two layers times 3e4"
    silent = False
    reported_by: ClassVar = ("raw_loss_finite", "gradients_finite")
    mechanism = "forward_overflow_in_float16"
    step = 1
    precision = "fp16-true"

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """Enlarge the base."""
        return overflow_float16(build(**arguments))
