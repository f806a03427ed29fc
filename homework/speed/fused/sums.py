"""The sums of LoRA layers in few products, for all layers that take the same input at once.

peft adds `lora_B(lora_A(x)) * scaling` to the frozen layer's result in three passes over it, and autograd adds the
gradients of `x` from all products and all layers that take the same `x` in as many passes more. Here each of these sums
is part of a product. The factors A of layers that take the same `x` (queries, keys, values) are stacked, for one
product. Under autocast `x` is cast once for all of them, where peft casts it for each product and back. The backward
pass keeps `x`, the narrow `lora_A(x)`, and the weights in the dtype of the products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Sum(NamedTuple):
    """The sum that a layer computes: `x @ weight.T + bias + scaling * x @ a.T @ b.T`, all products in `dtype`.

    Shapes: weight (out, in), bias (out,), a (rank, in), b (out, rank). Only bias, a and b may be trainable.
    """

    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    scaling: float
    dtype: torch.dtype

    @property
    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """All tensors of the sum."""
        return self[:4]

    @property
    def versions(self) -> tuple[int | None, ...]:
        """How often each tensor has been changed."""
        return tuple(version_of(t) for t in self.tensors if t is not None)

    @property
    def trainable(self) -> bool:
        """Whether any tensor needs a gradient."""
        return any(t.requires_grad for t in self.tensors if t is not None)

    def is_like(self, other: Sum) -> bool:
        """Whether the same products can compute both."""
        alike = self.dtype == other.dtype and self.weight.device == other.weight.device
        return alike and self.trainable == other.trainable

    def is_the_same(self, other: Sum) -> bool:
        """Whether both have the very same tensors, scaling and dtype."""
        same = self.weight is other.weight and self.bias is other.bias and self.a is other.a and self.b is other.b
        return same and self.scaling == other.scaling and self.dtype == other.dtype


class _Sums(torch.autograd.Function):
    """The sums of several layers that take the same `x`. Shapes: x (..., in), each result (..., out)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scalings: tuple[float, ...], *tensors: Any) -> tuple[Tensor, ...]:
        dtype, shape, rows = x.dtype, x.shape[:-1], x.flatten(0, -2)
        factors = tensors[2::4]
        ranks = [a.shape[0] for a in factors]
        narrow = rows @ _stacked(factors, dtype).t()
        results, kept = [], []
        for i, part in enumerate(torch.split(narrow, ranks, 1)):
            weight, bias, a, b = tensors[4 * i : 4 * i + 4]
            # a cast weight is kept for the backward pass, as autocast keeps its own
            weight = weight.to(dtype)
            start, beta = (x.new_empty(()), 0) if bias is None else (bias.to(dtype), 1)
            # not a view, since the caller may write into it
            result = x.new_empty(*shape, weight.shape[0])
            flat = result.flatten(0, -2)
            torch.addmm(start, part, b.to(dtype).t(), beta=beta, alpha=scalings[i], out=flat).addmm_(rows, weight.t())
            results.append(result)
            kept += [weight, a, b]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, narrow, *kept)
        ctx.ranks, ctx.scalings, ctx.device_type = ranks, scalings, x.device.type
        ctx.dtypes = [None if t is None else t.dtype for t in tensors]
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if not torch.is_autocast_enabled(ctx.device_type):
            return _backward(ctx, gradients)
        # autocast would cast some products, and not those in place
        with torch.autocast(ctx.device_type, enabled=False):
            return _backward(ctx, gradients)


def _backward(ctx: Any, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    x, narrow, *kept = ctx.saved_tensors
    dtype, needed = x.dtype, ctx.needs_input_grad
    grads: list[Tensor | None] = [None] * len(ctx.dtypes)
    none, grads_narrow, used = x.new_empty(()), [], []
    for i, part in enumerate(torch.split(narrow, ctx.ranks, 1)):
        gradient = gradients[i]
        # an unused result gives None and not zeros, with which an optimizer would make a step
        if gradient is None:
            continue
        rows, scaling = gradient.flatten(0, -2), ctx.scalings[i]
        used.append((i, rows))
        grads_narrow.append(torch.addmm(none, rows, kept[3 * i + 2].to(dtype), beta=0, alpha=scaling))
        grads[4 * i + 1] = rows.sum(0) if needed[4 * i + 3] else None
        # computed as wide as `rows` and then transposed; the transposed product takes 1.5 times as long
        grads[4 * i + 3] = torch.addmm(none, part.t(), rows, beta=0, alpha=scaling).t().contiguous()
    if not used:
        return None, None, *grads
    grad_narrow = torch.cat(grads_narrow, 1) if len(used) > 1 else grads_narrow[0]
    grad_x = None
    if needed[0]:
        grad_x = grad_narrow @ _stacked([kept[3 * i + 1] for i, _ in used], dtype)
        for i, rows in used:
            grad_x.addmm_(rows, kept[3 * i])
        grad_x = grad_x.view_as(x)
    grads_a = torch.split(grad_narrow.t() @ x.flatten(0, -2), [ctx.ranks[i] for i, _ in used])
    for (i, _), grad_a in zip(used, grads_a, strict=True):
        grads[4 * i + 2] = grad_a
    return grad_x, None, *(None if t is None else t.to(dtype) for t, dtype in zip(grads, ctx.dtypes, strict=True))


def _stacked(factors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return factors A as one matrix, shape (sum of ranks, in)."""
    return (torch.cat(tuple(factors)) if len(factors) > 1 else factors[0]).to(dtype)


def sums(x: Tensor, layers: Sequence[Sum]) -> tuple[Tensor, ...]:
    """Return the result of each layer for `x`, in the layers' dtype. Shapes (..., in) to (..., out)."""
    given = [tensor for layer in layers for tensor in layer.tensors]
    scalings = tuple(layer.scaling for layer in layers)
    results: tuple[Tensor, ...] = _Sums.apply(x.to(layers[0].dtype), scalings, *given)  # type: ignore[no-untyped-call]
    return results


def version_of(tensor: Tensor) -> int | None:
    """Return how often `tensor` has been changed in place; None where torch does not count it."""
    return None if tensor.is_inference() else tensor._version
