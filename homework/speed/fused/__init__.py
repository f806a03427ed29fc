"""A model's own arithmetic in fewer passes: LoRA's sums, RMS norms, rotary embeddings, the loss of each token.

Runs in the forward and backward passes of the training. A module takes the fused path where that computes the same,
and its own code in every other case.
"""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import Linear
from torch import Tensor, nn

from ..trials import trial
from .linear import FusedLinear
from .losses import token_losses
from .norm import FusedNorm, eps_of, fused
from .rotary import rotaries, rotated
from .siblings import find_siblings, join, part

__all__ = ["fuse", "join_siblings", "rotaries", "rotated", "token_losses", "unfuse"]


def fuse(model: nn.Module) -> int:
    """Switch every plain LoRA layer and every frozen RMS norm of `model` to the fused path; return their number."""
    count = 0
    for module in list(model.modules()):
        if type(module) is Linear:
            module.__class__ = FusedLinear
        elif (eps := eps_of(module)) is not None:
            module._fused_eps = eps  # type: ignore[assignment]
            module.__class__ = fused(type(module))
        else:
            continue
        count += 1
    return count


_seen: dict[tuple[Any, ...], list[list[str]]] = {}
"""The names of siblings, by model type, configuration and layer names."""


def join_siblings(model: Any, inner: Any, batch: dict[str, Tensor]) -> int:
    """Let LoRA layers that take the same input compute together; return their number.

    A forward pass over `batch` shows which they are, once per process for each type and configuration of `inner`, the
    model that peft has wrapped, and the names of its LoRA layers.
    """
    layers: dict[str, FusedLinear] = {name: m for name, m in model.named_modules() if isinstance(m, FusedLinear)}
    key = type(inner), inner.config.to_json_string(use_diff=False), *layers
    if key not in _seen:
        given = {name: tensor.to(model.device) for name, tensor in batch.items() if name != "labels"}
        try:
            with trial(model):
                _seen[key] = find_siblings(layers, lambda: model(**given, use_cache=False))
        # models refuse such inputs with errors of many types
        except Exception:
            return 0
    for names in _seen[key]:
        join(layers[name] for name in names)
    return sum(map(len, _seen[key]))


def unfuse(model: nn.Module) -> None:
    """Switch every module of `model` back to its own code."""
    for module in model.modules():
        if isinstance(module, (FusedLinear, FusedNorm)):
            module.__class__ = module.plain  # type: ignore[assignment]
            part(module)
