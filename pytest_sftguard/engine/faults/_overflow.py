"""A base whose activations exceed the range of float16, and are well within that of the wider types."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import Trainer

_FACTOR = 3e4
_LARGEST = 3e4  # the weights themselves stay within float16


def overflow_float16(trainer: Trainer) -> Trainer:
    """Multiply the weights of the two layers of the last MLP that is found, or else of the largest layer."""
    with torch.no_grad():
        for weight in _weights(trainer.model):
            weight.mul_(min(_FACTOR, _LARGEST / float(weight.abs().max())))
    return trainer


def _weights(model: nn.Module) -> list[Tensor]:
    """Weights of two consecutive layers: one that widens, and one beside it that comes back."""
    found: list[Tensor] = []
    for parent in model.modules():
        layers = [w for w in map(_weight, parent.children()) if w is not None]
        wide = [w for w in layers if max(w.shape) > min(w.shape)]
        pairs = [(up, down) for up in wide for down in wide if up is not down and up.shape == down.shape[::-1]]
        if pairs:
            found = [*pairs[-1]]
    if found:
        return found
    weights = [w for w in map(_weight, model.modules()) if w is not None]
    return [max(weights, key=Tensor.numel)]


def _weight(module: nn.Module) -> Tensor | None:
    """The frozen matrix of a linear layer, adapted or not; None of anything else, of a quantised one too."""
    layer: Any = getattr(module, "base_layer", module)
    weight = getattr(layer, "weight", None)
    linear = isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"
    if not linear or not isinstance(weight, Tensor) or weight.dim() != 2 or weight.requires_grad:
        return None
    return weight if weight.is_floating_point() else None
