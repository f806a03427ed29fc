"""A model's own arithmetic in fewer passes: LoRA's sums, RMS norms, rotary positions, the loss of each token.

A module takes its short way where that is the same sum, and goes its own where anything else is asked of it.
"""

from __future__ import annotations

from peft.tuners.lora import Linear
from torch import nn

from .linear import FusedLinear
from .losses import token_losses
from .norm import FusedNorm, eps_of, fused
from .rotary import rotaries, rotated

__all__ = ["fuse", "rotaries", "rotated", "token_losses", "unfuse"]


def fuse(model: nn.Module) -> int:
    """Let every plain LoRA layer and every frozen RMS norm of `model` take the short way; return how many do."""
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


def unfuse(model: nn.Module) -> None:
    """Let every module of `model` go its own way again."""
    for module in model.modules():
        if isinstance(module, (FusedLinear, FusedNorm)):
            module.__class__ = module.plain  # type: ignore[assignment]
