"""Greedy decoding of NaN logits returns one id for ever, and raises nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from transformers import TrainerCallback

from pytest_sftguard.engine.faults import Fault

if TYPE_CHECKING:
    from transformers import Trainer


class NanLogitsDecodeAsTokenZero(Fault):
    """One entry of the first adapted layer is NaN after the last step, and attention is eager, so that it spreads."""

    id = "nan-logits-decode-as-token-zero"
    source = "https://github.com/microsoft/onnxruntime-genai/pull/2444"
    injects = "NaN in one entry of one lora_B at the end of the training, with eager attention"
    reported_by: ClassVar = ("eval_and_decode_finite", "strict_answers", "weights_and_moments_finite")
    mechanism = "nan_in_adapter"
    tensor = "lora_B"
    asks = True

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """Poison one entry when the training ends."""
        trainer: Any = build(**arguments)
        base = trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model
        with contextlib.suppress(AttributeError, ValueError, NotImplementedError):
            base.set_attn_implementation("eager")
        trainer.add_callback(_Poison(trainer))
        return trainer


class _Poison(TrainerCallback):  # type: ignore[misc] # transformers types its callbacks as Any
    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the one NaN."""
        for name, parameter in self.trainer.model.named_parameters():
            if "lora_B" in name and parameter.requires_grad:
                parameter.data.view(-1)[0] = torch.nan
                return
