"""peft's LoRA layer, which takes the short way where it is the same sum."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn

from .siblings import siblings_of
from .sums import Sum, sums


class FusedLinear(Linear):  # type: ignore[misc] # peft's layers are untyped
    """One plain adapter on a plain frozen layer: products as in sums.py. peft's own way in any other case."""

    plain: type[nn.Module] = Linear

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Shapes (..., in) to (..., out)."""
        by_the_compiler = torch.compiler.is_compiling()  # which fuses in its own way
        mine = None if args or kwargs or by_the_compiler else self.sum_for(x)
        if mine is None:
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        siblings = siblings_of(self)
        if siblings is None:
            return sums(x, [mine])[0]
        return siblings.result(self, x, mine)

    def sum_for(self, x: Tensor) -> Sum | None:
        """What the layer adds up for `x`, and None where it does anything else."""
        layers = None if x.dim() < 2 else self._at_work()
        if layers is None:
            return None
        name, base, a, b = layers
        weight, its_a, its_b = base.weight, a.weight, b.weight
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            one = x.dtype != torch.float64
        else:
            dtype = x.dtype
            one = weight.dtype == dtype and its_a.dtype == dtype and its_b.dtype == dtype
        if not one or weight.requires_grad:  # products of several types, or more than the factors learns
            return None
        return Sum(weight, base.bias, its_a, its_b, self.scaling[name], dtype)

    def _at_work(self) -> tuple[str, nn.Linear, nn.Linear, nn.Linear] | None:
        """The one adapter that is at work, and its layers; None where anything beside its two products is asked for."""
        adapters = self.active_adapters
        if self.disable_adapters or self.merged or len(adapters) != 1:
            return None
        [name] = adapters
        if name not in self.lora_A or name in self.lora_variant or type(self.lora_dropout[name]) is not nn.Identity:
            return None
        base, a, b = self.base_layer, self.lora_A[name], self.lora_B[name]
        # a quantised layer multiplies in its own way
        plain = all(type(m) is nn.Linear and not hooked(m) for m in (base, a, b))
        return (name, base, a, b) if plain and a.bias is None and b.bias is None else None


def hooked(module: nn.Module) -> bool:
    """Whether somebody sees, or changes, what goes into the module or comes out of it."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
    )
