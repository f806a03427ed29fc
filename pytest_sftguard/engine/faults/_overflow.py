"""A base whose activations exceed the range of float16, and are well within that of the wider types."""

from __future__ import annotations

import itertools
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import Trainer

_FACTOR = 3e4
_LARGEST = 3e4  # the weights themselves stay within float16


def overflow_float16(trainer: Trainer) -> Trainer:
    """Multiply the weights of the two layers of the last MLP; where there is none, of the last two linear layers."""
    with torch.no_grad():
        for layer in _layers(trainer.model):
            layer.weight.mul_(min(_FACTOR, _LARGEST / float(layer.weight.abs().max())))
    return trainer


def _layers(model: Any) -> tuple[Any, ...]:
    """Two layers in a row before the head: one that widens, and one that comes back."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    head = getattr(head, "base_layer", head)
    linear = [m for n, m in model.named_modules() if "lora_" not in n and m is not head and _is_frozen_linear(m)]
    pairs = list(itertools.pairwise(linear))
    mlps = [p for p in pairs if _widening(p[0]) > 1 and _widening(p[0]) * _widening(p[1]) == 1]
    return (mlps or pairs)[-1]


def _is_frozen_linear(module: nn.Module) -> bool:
    """Whether this is a linear layer that is not trained and not quantised."""
    weight: Any = getattr(module, "weight", None)
    linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    return linear and weight.is_floating_point() and not weight.requires_grad


def _widening(layer: Any) -> Fraction:
    """Outputs for each input."""
    one, other = layer.weight.shape
    return Fraction(one, other) if isinstance(layer, nn.Linear) else Fraction(other, one)
