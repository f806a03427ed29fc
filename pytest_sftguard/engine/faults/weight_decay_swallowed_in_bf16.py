"""Decay of lr x wd x w is below the resolution of bfloat16: there is none at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_sftguard.engine.faults import Fault
from pytest_sftguard.engine.faults._training import cast

if TYPE_CHECKING:
    from transformers import Trainer


class WeightDecaySwallowedInBf16(Fault):
    """The adapter is kept in bfloat16, under weight decay."""

    id = "weight-decay-swallowed-in-bf16"
    source = "https://github.com/Nerogar/OneTrainer/issues/996"
    injects = "trainable tensors in bfloat16, weight decay 0.1, learning rate 1e-4"
    reported_by: ClassVar = ("fp32_master",)
    mechanism = "updates_swallowed_in_bfloat16"
    tensor = "lora_"
    arguments: ClassVar = {"weight_decay": 0.1, "learning_rate": 1e-4}

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """Cast the trainable tensors."""
        import torch

        return cast(build(**arguments), torch.bfloat16)
