"""A factor that became NaN in the last step differs from its start, and so counts as trained."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from pytest_sftguard.engine.faults import Fault
from pytest_sftguard.engine.faults._training import At, factor

if TYPE_CHECKING:
    from transformers import Trainer


class NanCountsAsChanged(Fault):
    """A moment that is NaN just before the last step: every loss and gradient of the run is finite."""

    id = "nan-counts-as-changed"
    source = "https://github.com/huggingface/peft/issues/2448"
    injects = "NaN in a moment of one lora_A before the last step, or in the factor itself after it"
    reported_by: ClassVar = ("weights_and_moments_finite", "every_factor_moves")
    mechanism = "optimizer_state_poisoned"
    step = 8
    tensor = "lora_A"

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """Poison the optimizer's state, or the factor itself where it keeps none."""
        trainer = build(**arguments)
        parameter, last = factor(trainer, "lora_A"), trainer.args.max_steps

        def poison() -> None:
            states = trainer.optimizer.state.get(parameter, {}).values()
            moments = [s for s in states if isinstance(s, torch.Tensor) and s.numel() > 1 and s.is_floating_point()]
            (moments[0] if moments else parameter.data).view(-1)[0] = math.nan

        trainer.add_callback(At("on_pre_optimizer_step", poison, last))
        return trainer
