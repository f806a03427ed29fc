"""A fused cross-entropy gives the right loss and a wrong gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from pytest_sftguard.engine.faults import Fault

if TYPE_CHECKING:
    from transformers import Trainer


class FusedLossWrongGradient(Fault):
    """The gradient that comes from above is applied as one number, the first supervised token's, to every token."""

    id = "fused-loss-wrong-gradient"
    source = "https://github.com/linkedin/Liger-Kernel/issues/968"
    injects = "a cross-entropy whose backward pass weighs every token, masked ones too, as the first supervised one"
    reported_by: ClassVar = ("path_equivalence", "answers_beat_base")
    mechanism = "loss_gradient_wrong"

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """Exchange the loss."""
        trainer: Any = build(**arguments)
        original = trainer.compute_loss

        def compute_loss(
            model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **kwargs: Any
        ) -> Any:
            labels = inputs.get("labels")
            if labels is None or labels.ndim != 2:
                return original(model, inputs, return_outputs, num_items_in_batch, **kwargs)
            outputs = model(**{k: v for k, v in inputs.items() if k != "labels"})
            wanted = labels[:, 1:]
            fused: Any = _Fused.apply
            losses = fused(outputs.logits[:, :-1].float(), wanted)
            count = (wanted != -100).sum() if num_items_in_batch is None else num_items_in_batch
            loss = losses.sum() / count
            return (loss, outputs) if return_outputs else loss

        trainer.compute_loss = compute_loss
        return trainer


class _Fused(torch.autograd.Function):
    """Cross-entropy of each token, 0 for masked ones: shapes (rows, tokens, vocabulary) and (rows, tokens)."""

    @staticmethod
    def forward(context: Any, logits: Tensor, labels: Tensor) -> Tensor:
        """The right losses."""
        context.save_for_backward(logits, labels)
        chances = logits.log_softmax(-1)
        losses = -chances.gather(-1, labels.clamp_min(0)[..., None])[..., 0]
        return torch.where(labels == -100, 0.0, losses)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Any:
        """The wrong gradient."""
        logits, labels = context.saved_tensors
        first = gradient[labels != -100].reshape(-1)
        wanted = torch.nn.functional.one_hot(labels.clamp_min(0), logits.shape[-1])
        return (logits.softmax(-1) - wanted) * (first[0] if len(first) else 0.0), None
