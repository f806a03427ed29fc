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
        name = None if x.dim() < 2 else self._the_adapter()
        dtype = None if name is None else self._dtype_of_products(name, x)
        if name is None or dtype is None:
            return None
        base, a, b = self.base_layer, self.lora_A[name].weight, self.lora_B[name].weight
        return Sum(base.weight, base.bias, a, b, self.scaling[name], dtype)

    def _dtype_of_products(self, name: str, x: Tensor) -> torch.dtype | None:
        """The type that every product of the layer is computed in; None where it is not one."""
        if torch.is_autocast_enabled(x.device.type):
            return torch.get_autocast_dtype(x.device.type) if x.dtype != torch.float64 else None
        types = {x.dtype, self.base_layer.weight.dtype, self.lora_A[name].weight.dtype, self.lora_B[name].weight.dtype}
        return x.dtype if len(types) == 1 else None

    def _the_adapter(self) -> str | None:
        """The one adapter that is at work; None where anything beside its two products is asked for."""
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return None
        base = self.base_layer
        if type(base) is not nn.Linear or base.weight.requires_grad or hooked(base):
            return None  # a quantised one multiplies in its own way
        [name] = self.active_adapters
        if name not in self.lora_A or name in self.lora_variant or type(self.lora_dropout[name]) is not nn.Identity:
            return None
        pair = (self.lora_A[name], self.lora_B[name])
        return name if all(type(m) is nn.Linear and m.bias is None and not hooked(m) for m in pair) else None


def hooked(module: nn.Module) -> bool:
    """Whether somebody sees, or changes, what goes into the module or comes out of it."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
    )
