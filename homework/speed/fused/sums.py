"""The sums of LoRA layers in few products: of all layers that take the same input at once.

peft adds `lora_B(lora_A(x)) * scaling` to the frozen layer's result in three passes over that result; the gradients of
`x` from both, and from all layers that take the same `x`, are added in as many passes more. Here each of these sums is
part of a product. The factors A of layers that take the same `x` (queries, keys, values) lie one below the other, in
one product. Under autocast `x` is cast once for all of them, where peft casts it for each product and back. Beside
weights in the type of the products, `x` and the narrow `lora_A(x)` are kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Sum(NamedTuple):
    """What a layer adds up: `x @ weight.T + bias + scaling * x @ a.T @ b.T`, all products in `dtype`.

    Shapes: weight (out, in), bias (out,), a (rank, in), b (out, rank). Only bias, a and b may learn.
    """

    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    scaling: float
    dtype: torch.dtype

    @property
    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """All that `x` meets."""
        return self[:4]

    @property
    def versions(self) -> tuple[int | None, ...]:
        """How often each of them was changed by now."""
        return tuple(version_of(t) for t in self.tensors if t is not None)

    @property
    def learns(self) -> bool:
        """Whether anything of it does."""
        return any(t.requires_grad for t in self.tensors if t is not None)

    def is_like(self, other: Sum) -> bool:
        """Whether both can be found in the same products."""
        alike = self.dtype == other.dtype and self.weight.device == other.weight.device
        return alike and self.learns == other.learns

    def is_the_same(self, other: Sum) -> bool:
        """Whether both are of the very same tensors."""
        same = self.weight is other.weight and self.bias is other.bias and self.a is other.a and self.b is other.b
        return same and self.scaling == other.scaling and self.dtype == other.dtype


class _Sums(torch.autograd.Function):
    """The sums of several layers that take the same `x`. Shapes: x (..., in), each result (..., out)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scalings: tuple[float, ...], *tensors: Any) -> tuple[Tensor, ...]:
        dtype, shape, rows = x.dtype, x.shape[:-1], x.flatten(0, -2)
        factors = tensors[2::4]
        ranks = [a.shape[0] for a in factors]
        narrow = rows @ _below_each_other(factors, dtype).t()
        results, kept = [], []
        for i, part in enumerate(torch.split(narrow, ranks, 1)):
            weight, bias, a, b = tensors[4 * i : 4 * i + 4]
            weight = weight.to(dtype)  # a cast one is kept, as autocast keeps its own
            start, beta = (x.new_empty(()), 0) if bias is None else (bias.to(dtype), 1)
            result = x.new_empty(*shape, weight.shape[0])  # no view: whoever gets it may write over it
            line = result.flatten(0, -2)
            torch.addmm(start, part, b.to(dtype).t(), beta=beta, alpha=scalings[i], out=line).addmm_(rows, weight.t())
            results.append(result)
            kept += [weight, a, b]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, narrow, *kept)
        ctx.ranks, ctx.scalings, ctx.kind = ranks, scalings, x.device.type
        ctx.types = [None if t is None else t.dtype for t in tensors]
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if not torch.is_autocast_enabled(ctx.kind):
            return _backward(ctx, gradients)
        with torch.autocast(ctx.kind, enabled=False):  # which casts some products, and not those in place
            return _backward(ctx, gradients)


def _backward(ctx: Any, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    x, narrow, *kept = ctx.saved_tensors
    dtype, needed = x.dtype, ctx.needs_input_grad
    of: list[Tensor | None] = [None] * len(ctx.types)
    none, of_narrow, used = x.new_empty(()), [], []
    for i, part in enumerate(torch.split(narrow, ctx.ranks, 1)):
        gradient = gradients[i]
        if gradient is None:  # nobody used the result: nothing is learnt from it, and an optimizer makes steps of zeros
            continue
        rows, scaling = gradient.flatten(0, -2), ctx.scalings[i]
        used.append((i, rows))
        of_narrow.append(torch.addmm(none, rows, kept[3 * i + 2].to(dtype), beta=0, alpha=scaling))
        of[4 * i + 1] = rows.sum(0) if needed[4 * i + 3] else None
        # as wide as `rows` and transposed then: the other way round, it takes half as long again
        of[4 * i + 3] = torch.addmm(none, part.t(), rows, beta=0, alpha=scaling).t().contiguous()
    if not used:
        return None, None, *of
    of_all = torch.cat(of_narrow, 1) if len(used) > 1 else of_narrow[0]
    of_x = None
    if needed[0]:
        of_x = of_all @ _below_each_other([kept[3 * i + 1] for i, _ in used], dtype)
        for i, rows in used:
            of_x.addmm_(rows, kept[3 * i])
        of_x = of_x.view_as(x)
    of_as = torch.split(of_all.t() @ x.flatten(0, -2), [ctx.ranks[i] for i, _ in used])
    for (i, _), of_a in zip(used, of_as, strict=True):
        of[4 * i + 2] = of_a
    return of_x, None, *(t if t is None else t.to(kind) for t, kind in zip(of, ctx.types, strict=True))


def _below_each_other(factors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Factors A in one matrix, shape (sum of ranks, in)."""
    return (torch.cat(tuple(factors)) if len(factors) > 1 else factors[0]).to(dtype)


def sums(x: Tensor, layers: Sequence[Sum]) -> tuple[Tensor, ...]:
    """Results of layers that take the same `x`, of shape (..., in); each of shape (..., out), in the layers' dtype."""
    given = [tensor for layer in layers for tensor in layer.tensors]
    scalings = tuple(layer.scaling for layer in layers)
    results: tuple[Tensor, ...] = _Sums.apply(x.to(layers[0].dtype), scalings, *given)  # type: ignore[no-untyped-call]
    return results


def version_of(tensor: Tensor) -> int | None:
    """How often `tensor` was changed, as far as torch counts it; None where it does not."""
    return None if tensor.is_inference() else tensor._version
