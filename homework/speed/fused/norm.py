"""RMS norms with fewer passes over their activations.

torch's graph of one makes a tensor as large as its input for each operation, forward and back. Here products are
written over each other, and the backward pass takes the derivative as a whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .linear import hooked


class _Normalise(torch.autograd.Function):
    """`weight * x / sqrt(mean(x**2) + eps)` over the last dimension, in float32; the weight is frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        x, weight, inverse = ctx.saved_tensors
        of_normal = gradient * weight
        along = torch.linalg.vecdot(of_normal, x)[..., None].mul_(inverse.pow(3)).div_(-x.shape[-1])
        return of_normal.mul_(inverse).addcmul_(x, along), None, None


class FusedNorm(nn.Module):
    """An RMS norm that takes the short way in float32 and on a frozen weight, and its own in any other case."""

    plain: type[nn.Module]
    weight: Tensor
    _fused_eps: float

    def forward(self, x: Tensor) -> Tensor:
        """Shapes (..., size) to (..., size)."""
        if x.dtype != torch.float32 or self.weight.dtype != torch.float32 or self.weight.requires_grad:
            return super().forward(x)  # type: ignore[no-any-return]
        normal: Tensor = _Normalise.apply(x, self.weight, self._fused_eps)  # type: ignore[no-untyped-call]
        return normal


_FUSED: dict[type[nn.Module], type[FusedNorm]] = {}


def fused(kind: type[nn.Module]) -> type[FusedNorm]:
    """A kind of norm, with the short way before its own."""
    if kind not in _FUSED:
        _FUSED[kind] = type(f"Fused{kind.__name__}", (FusedNorm, kind), {"plain": kind})
    return _FUSED[kind]


@torch.no_grad()
def eps_of(module: nn.Module) -> float | None:
    """The eps of a module that is an RMS norm and nothing more, tried out; None for any other."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = getattr(module, "weight", None)
    if "RMSNorm" not in type(module).__name__ or not isinstance(eps, float) or not isinstance(weight, nn.Parameter):
        return None
    if [*module.state_dict()] != ["weight"] or weight.dim() != 1 or weight.dtype != torch.float32 or hooked(module):
        return None
    x = torch.linspace(-1, 2, 3 * len(weight), device=weight.device).view(3, -1)
    ours = _Normalise.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return eps if torch.allclose(module(x), ours, rtol=1e-5, atol=1e-6) else None
