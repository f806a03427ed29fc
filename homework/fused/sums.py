"""The sums of LoRA layers in few products: of all layers that take the same input at once.

peft adds `lora_B(lora_A(x)) * scaling` to the frozen layer's result in three passes over that result; the gradients of
`x` from both, and from all layers that take the same `x`, are added in as many passes more. Here each of these sums is
part of a product. The factors A of layers that take the same `x` (queries, keys, values) lie one below the other, in
one product. Under autocast `x` is cast once for all of them, where peft casts it for each product and back. Beside
weights in the type of the products, `x` and the narrow `lora_A(x)` are kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True, eq=False)
class Sum:
    """What a layer adds up: `x @ weight.T + bias + scaling * x @ a.T @ b.T`, all products in `dtype`.

    Shapes: weight (out, in), bias (out,), a (rank, in), b (out, rank). Only bias, a and b may learn.
    """

    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    scaling: float
    dtype: torch.dtype

    versions: tuple[int | None, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "versions", tuple(version_of(t) for t in self.tensors if t is not None))

    @property
    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """All that `x` meets."""
        return self.weight, self.bias, self.a, self.b

    @property
    def learns(self) -> bool:
        """Whether anything of it does."""
        return any(t.requires_grad for t in self.tensors if t is not None)

    def is_like(self, other: Sum) -> bool:
        """Whether both can be found in the same products."""
        mine, theirs = ((s.dtype, s.weight.device, s.learns) for s in (self, other))
        return mine == theirs

    def is_still(self, other: Sum) -> bool:
        """Whether both are of the very same numbers, and none has changed in between."""
        same = all(a is b for a, b in zip(self.tensors, other.tensors, strict=True)) and None not in self.versions
        return same and self.versions == other.versions and self.scaling == other.scaling and self.is_like(other)


class _Sums(torch.autograd.Function):
    """The sums of several layers that take the same `x`. Shapes: x (..., in), each result (..., out)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scalings: tuple[float, ...], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        layers: list[Any] = list(zip(*(iter(tensors),) * 4, strict=True))
        rows, ranks = x.flatten(0, -2), [len(a) for _, _, a, _ in layers]
        narrow = rows @ _below_each_other([a for _, _, a, _ in layers], x.dtype).t()
        results, kept = [], []
        for (weight, bias, a, b), scaling, part in zip(layers, scalings, torch.split(narrow, ranks, 1), strict=True):
            weight = weight.to(x.dtype)  # a cast one is kept, as autocast keeps its own
            start, beta = (x.new_empty(()), 0) if bias is None else (bias.to(x.dtype), 1)
            result = x.new_empty(*x.shape[:-1], len(weight))  # no view: whoever gets it may write over it
            line = result.flatten(0, -2)
            torch.addmm(start, part, b.to(x.dtype).t(), beta=beta, alpha=scaling, out=line).addmm_(rows, weight.t())
            results.append(result)
            kept += [weight, a, b]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, narrow, *kept)
        ctx.ranks, ctx.scalings, ctx.types = ranks, scalings, [None if t is None else t.dtype for t in tensors]
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, narrow, *kept = ctx.saved_tensors
        parts = torch.split(narrow, ctx.ranks, 1)
        layers = zip(gradients, parts, *(kept[i::3] for i in range(3)), ctx.scalings, strict=True)
        # from a result that nobody used, nothing is learnt, and an optimizer makes steps of zeros
        used = {i: (g.flatten(0, -2), *layer) for i, (g, *layer) in enumerate(layers) if g is not None}
        of: list[Tensor | None] = [None] * len(ctx.types)
        if not used:
            return None, None, *of
        none, of_x, of_narrow = x.new_empty(()), None, []
        with torch.autocast(x.device.type, enabled=False):  # which casts some products, and not those in place
            for i, (rows, part, _, _, b, scaling) in used.items():
                of_narrow.append(torch.addmm(none, rows, b.to(x.dtype), beta=0, alpha=scaling))
                of[4 * i + 1] = rows.sum(0) if ctx.needs_input_grad[4 * i + 3] else None
                # as wide as `rows` and transposed then: the other way round, it takes half as long again
                of[4 * i + 3] = torch.addmm(none, part.t(), rows, beta=0, alpha=scaling).t().contiguous()
            of_all = torch.cat(of_narrow, 1)
            of_as = torch.split(of_all.t() @ x.flatten(0, -2), [ctx.ranks[i] for i in used])
            if ctx.needs_input_grad[0]:
                of_x = of_all @ _below_each_other([a for _, _, _, a, _, _ in used.values()], x.dtype)
                for rows, _, weight, _, _, _ in used.values():
                    of_x.addmm_(rows, weight)
                of_x = of_x.view_as(x)
        for i, of_a in zip(used, of_as, strict=True):
            of[4 * i + 2] = of_a
        return of_x, None, *(t if t is None else t.to(dtype) for t, dtype in zip(of, ctx.types, strict=True))


def _below_each_other(factors: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Factors A in one matrix, shape (sum of ranks, in)."""
    return torch.cat(factors).to(dtype)


def sums(x: Tensor, layers: Sequence[Sum]) -> tuple[Tensor, ...]:
    """Results of layers that take the same `x`, of shape (..., in); each of shape (..., out), in the layers' dtype."""
    given = [tensor for layer in layers for tensor in layer.tensors]
    scalings = tuple(layer.scaling for layer in layers)
    results: tuple[Tensor, ...] = _Sums.apply(x.to(layers[0].dtype), scalings, *given)  # type: ignore[no-untyped-call]
    return results


def version_of(tensor: Tensor) -> int | None:
    """How often `tensor` was changed, as far as torch counts it; None where it does not."""
    return None if tensor.is_inference() else tensor._version
