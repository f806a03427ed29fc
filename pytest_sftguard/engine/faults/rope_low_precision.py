"""Rotary frequencies are cast to bfloat16 with the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from pytest_sftguard.engine.faults import Fault

if TYPE_CHECKING:
    from transformers import Trainer


class RopeLowPrecision(Fault):
    """The model is cast after it was made, and its buffers with it: positions above 256 cannot be told apart."""

    id = "rope-low-precision"
    source = "https://github.com/huggingface/transformers/pull/29285"
    injects = "every buffer of rotary frequencies in bfloat16, as model.to(torch.bfloat16) leaves them"
    reported_by: ClassVar = ("context_independence", "precision_agreement")
    mechanism = "rotary_frequencies_in_half_precision"
    precision = "bf16-true"

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """Cast the buffers."""
        trainer = build(**arguments)
        for module in trainer.model.modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                if name.endswith("inv_freq"):
                    setattr(module, name, buffer.to(torch.bfloat16))
        return trainer
