"""float16 trainables under a loss scaler, which refuses to unscale their gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_sftguard.engine.faults import Fault
from pytest_sftguard.engine.faults._training import cast

if TYPE_CHECKING:
    from transformers import Trainer


class AttemptingToUnscaleFp16(Fault):
    """The adapter is cast after it was made, `.half()` as scripts have it."""

    id = "attempting-to-unscale-fp16"
    source = "https://github.com/huggingface/diffusers/issues/6086"
    injects = "trainable tensors in float16 with fp16=True"
    silent = False
    reported_by: ClassVar = ("fp32_master",)
    mechanism = "half_trainables_under_a_scaler"
    tensor = "lora_"
    precision = "fp16-mixed"

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """Cast the trainable tensors."""
        import torch

        return cast(build(**arguments), torch.float16)
