"""A forward pass without gradients leaves casts without a graph in autocast's cache: not in this version."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from pytest_sftguard.engine.faults import Fault

if TYPE_CHECKING:
    from transformers import Trainer


class AutocastCacheKillsGradients(Fault):
    """Before each loss the model runs once without gradients, within the same autocast.

    A control: torch no longer takes such casts for ones with a graph.
    """

    id = "autocast-cache-kills-gradients"
    source = "https://github.com/pytorch/pytorch/issues/65766"
    injects = "a forward pass under no_grad, in the autocast in which the loss is computed next"
    precision = "bf16-mixed"

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """Run the model twice."""
        trainer: Any = build(**arguments)
        original = trainer.compute_loss

        def compute_loss(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            with trainer.accelerator.autocast():
                training = model.training
                model.eval()
                with torch.no_grad():
                    model(**{k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask")})
                model.train(training)
                return original(model, inputs, *args, **kwargs)

        trainer.compute_loss = compute_loss
        return trainer
