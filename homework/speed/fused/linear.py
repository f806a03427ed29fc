"""peft's LoRA layer with the fused path, taken where it computes the same sum."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn

from .siblings import siblings_of
from .sums import Sum, sums


# peft's layers are untyped
class FusedLinear(Linear):  # type: ignore[misc]
    """For one plain adapter on a plain frozen layer, products as in sums.py; peft's own code in every other case."""

    plain: type[nn.Module] = Linear

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Shapes (..., in) to (..., out)."""
        # the compiler fuses by itself
        mine = None if args or kwargs or torch.compiler.is_compiling() else self.sum_for(x)
        if mine is None:
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        siblings = siblings_of(self)
        if siblings is None:
            return sums(x, [mine])[0]
        return siblings.result(self, x, mine)

    def sum_for(self, x: Tensor) -> Sum | None:
        """Return the sum that the layer computes for `x`; None where it computes anything else."""
        layers = None if x.dim() < 2 else self._active_layers()
        if layers is None:
            return None
        name, base, a, b = layers
        weight, its_a, its_b = base.weight, a.weight, b.weight
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            one_dtype = x.dtype != torch.float64
        else:
            dtype = x.dtype
            one_dtype = weight.dtype == dtype and its_a.dtype == dtype and its_b.dtype == dtype
        if not one_dtype or weight.requires_grad:
            return None
        return Sum(weight, base.bias, its_a, its_b, self.scaling[name], dtype)

    def _active_layers(self) -> tuple[str, nn.Linear, nn.Linear, nn.Linear] | None:
        """Return the only active adapter and its layers; None where more than its two products is computed."""
        adapters = self.active_adapters
        if self.disable_adapters or self.merged or len(adapters) != 1:
            return None
        [name] = adapters
        if name not in self.lora_A or name in self.lora_variant or type(self.lora_dropout[name]) is not nn.Identity:
            return None
        base, a, b = self.base_layer, self.lora_A[name], self.lora_B[name]
        # a quantised layer has its own product
        plain = all(type(m) is nn.Linear and not hooked(m) for m in (base, a, b))
        return (name, base, a, b) if plain and a.bias is None and b.bias is None else None


def hooked(module: nn.Module) -> bool:
    """Return whether a hook or a wrapper may see or change the module's inputs or outputs."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
    )
