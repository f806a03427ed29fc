"""On a CPU sdpa turns a NaN query into zeros below 16 tokens: a NaN adapter still answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from transformers import TrainerCallback

from pytest_sftguard.engine.faults import Fault

if TYPE_CHECKING:
    from transformers import Trainer


_QUERIES = ("q_proj", "query", "c_attn", "qkv")


class SdpaCpuHidesNan(Fault):
    """Every factor `lora_B` of a query projection is NaN after the last step."""

    id = "sdpa-cpu-hides-nan"
    source = "https://github.com/pytorch/pytorch/issues/141128"
    injects = "NaN in every lora_B of the query projections, at the end of the training"
    reported_by: ClassVar = ("weights_and_moments_finite", "context_independence", "round_trip")
    mechanism = "nan_in_adapter"
    tensor = "lora_B"

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """Poison the queries when the training ends."""
        trainer = build(**arguments)
        trainer.add_callback(_Poison(trainer))
        return trainer


class _Poison(TrainerCallback):  # type: ignore[misc] # transformers types its callbacks as Any
    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Fill the factors."""
        factors = {n: p for n, p in self.trainer.model.named_parameters() if "lora_B" in n and p.requires_grad}
        queries = [p for n, p in factors.items() if any(q in n for q in _QUERIES)]
        for parameter in queries or factors.values():
            parameter.data.fill_(torch.nan)
