"""LoRA's linear layer with fewer passes over its activations.

peft adds `lora_B(lora_A(x)) * scaling` to the frozen layer's result in three passes over that result, and keeps what
the backward pass needs of each. Here the sum is part of the last product, and only `x` and the narrow `lora_A(x)` are
kept. Under autocast `x` is cast once for all layers that take it, where peft casts it for each product and back.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn


class _AddLora(torch.autograd.Function):
    """`result + scaling * x @ a.T @ b.T`, written over `result` where it is nobody else's.

    Shapes: result (..., out), x (..., in), a (rank, in), b (out, rank). All products are in the type of `x`.
    """

    @staticmethod
    def forward(ctx: Any, result: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float, over: bool) -> Tensor:
        a_cast, b_cast = a.to(x.dtype), b.to(x.dtype)
        narrow = x.flatten(0, -2) @ a_cast.t()
        ctx.save_for_backward(x, narrow, a, b)
        ctx.scaling = scaling
        if not over:
            return torch.addmm(result.flatten(0, -2), narrow, b_cast.t(), alpha=scaling).view(result.shape)
        result.view(-1, result.shape[-1]).addmm_(narrow, b_cast.t(), alpha=scaling)
        ctx.mark_dirty(result)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, narrow, a, b = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        of_narrow = rows @ (b.to(rows.dtype) * ctx.scaling)
        of_x = (of_narrow @ a.to(rows.dtype)).view_as(x) if ctx.needs_input_grad[1] else None
        of_a = (of_narrow.t() @ x.flatten(0, -2)).to(a.dtype)
        of_b = (rows.t() @ narrow).mul_(ctx.scaling).to(b.dtype)
        return gradient, of_x, of_a, of_b, None, None


class FusedLinear(Linear):  # type: ignore[misc] # peft's layers are untyped
    """peft's layer, which takes the short way where it is the same sum: one plain adapter on a plain frozen layer."""

    plain: type[nn.Module] = Linear

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Shapes (..., in) to (..., out)."""
        name = None if args or kwargs or x.dim() < 2 else self._the_adapter()
        dtype = None if name is None else self._dtype_of_products(name, x)
        if dtype is None:
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        x = _cast(x, dtype)
        result: Tensor = self.base_layer(x)
        over = result.is_contiguous() and not hooked(self.base_layer)  # a hook may have kept it
        factors = self.lora_A[name].weight, self.lora_B[name].weight
        added: Tensor = _AddLora.apply(result, x, *factors, self.scaling[name], over)  # type: ignore[no-untyped-call]
        return added

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
        if type(self.base_layer) is not nn.Linear:  # a quantised one multiplies in its own way
            return None
        [name] = self.active_adapters
        if name not in self.lora_A or name in self.lora_variant or type(self.lora_dropout[name]) is not nn.Identity:
            return None
        pair = (self.lora_A[name], self.lora_B[name])
        return name if all(type(m) is nn.Linear and m.bias is None and not hooked(m) for m in pair) else None


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in `dtype`, once for all layers that take it: the gradients of queries, keys and values meet in `dtype`."""
    if x.dtype == dtype:
        return x
    if x.requires_grad and x.is_leaf:  # its cast would hold x, and x its cast, and nobody would free the two
        return x.to(dtype)
    now = dtype, x._version, torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    known: tuple[Any, Tensor] | None = getattr(x, "_homework_cast", None)
    if known is None or known[0] != now:
        known = now, x.to(dtype)
        x._homework_cast = known  # type: ignore[attr-defined] # lives and dies with x
    return known[1]


def hooked(module: nn.Module) -> bool:
    """Whether somebody sees, or changes, what goes into the module or comes out of it."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
    )
