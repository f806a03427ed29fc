"""The sums of LoRA layers in few products: of all layers that take the same input at once.

peft adds `lora_B(lora_A(x)) * scaling` to the frozen layer's result in three passes over that result, and keeps what
the backward pass needs of each; the gradients of `x` from both, and from all layers that take the same `x`, are added
in as many passes more. Here each of these sums is part of a product, and only `x` and the narrow `lora_A(x)` are kept.
The factors A of layers that take the same `x` (queries, keys, values) lie one below the other, in one product.
Under autocast `x` is cast once for all of them, where peft casts it for each product and back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


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

    versions: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "versions", tuple(version_of(t) for t in self.tensors if t is not None))

    @property
    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """All that `x` meets."""
        return self.weight, self.bias, self.a, self.b

    def is_like(self, other: Sum) -> bool:
        """Whether both can be found in the same products."""
        return self.dtype == other.dtype and self.weight.device == other.weight.device

    def is_still(self, other: Sum) -> bool:
        """Whether both are of the very same numbers, and none has changed in between."""
        same = all(a is b for a, b in zip(self.tensors, other.tensors, strict=True))
        return same and self.versions == other.versions and self.scaling == other.scaling and self.is_like(other)


class _Sums(torch.autograd.Function):
    """The sums of several layers that take the same `x`. Shapes: x (..., in), each result (..., out)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scalings: tuple[float, ...], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        layers = list(zip(*(iter(tensors),) * 4, strict=True))
        rows = x.flatten(0, -2)
        a = torch.cat([layer[2] for layer in layers]).to(x.dtype)  # type: ignore[misc]
        ranks = [len(layer[2]) for layer in layers]  # type: ignore[arg-type]
        narrow = rows @ a.t()
        results, kept = [], []
        for (weight, bias, _, b), scaling, part in zip(layers, scalings, torch.split(narrow, ranks, 1), strict=True):
            weight, b = weight.to(x.dtype), b.to(x.dtype)  # type: ignore[union-attr]
            start, beta = (x.new_empty(()), 0) if bias is None else (bias.to(x.dtype), 1)
            result = x.new_empty(*x.shape[:-1], len(weight))  # no view: whoever gets it may write over it
            torch.addmm(start, part, b.t(), beta=beta, alpha=scaling, out=result.flatten(0, -2)).addmm_(
                rows, weight.t()
            )
            results.append(result)
            kept += [weight, b]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, a, narrow, *kept)
        ctx.ranks, ctx.scalings, ctx.types = ranks, scalings, [None if t is None else t.dtype for t in tensors]
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, a, narrow, *kept = ctx.saved_tensors
        none, ranks = x.new_empty(()), ctx.ranks
        layers = zip(
            gradients, torch.split(a, ranks), torch.split(narrow, ranks, 1), kept[::2], kept[1::2], ctx.scalings,
            strict=True,
        )  # fmt: skip
        # from a result that nobody used, nothing is learnt, and an optimizer makes steps of zeros
        used = {i: (g.flatten(0, -2), *layer) for i, (g, *layer) in enumerate(layers) if g is not None}
        of: list[Tensor | None] = [None] * len(ctx.types)
        of_narrow = []
        for i, (rows, _, its_narrow, _, b, scaling) in used.items():
            of_narrow.append(torch.addmm(none, rows, b, beta=0, alpha=scaling))
            of[4 * i + 1] = rows.sum(0) if ctx.needs_input_grad[4 * i + 3] else None
            # as wide as `rows` and transposed then: the other way round, such a product takes half as long again
            of[4 * i + 3] = torch.addmm(none, its_narrow.t(), rows, beta=0, alpha=scaling).t().contiguous()
        of_all = torch.cat(of_narrow, 1)
        of_a = torch.split(of_all.t() @ x.flatten(0, -2), [ranks[i] for i in used])
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = of_all @ (a if len(used) == len(gradients) else torch.cat([layer[1] for layer in used.values()]))
        for (i, (rows, _, _, weight, _, _)), its in zip(used.items(), of_a, strict=True):
            of[4 * i + 2] = its
            if of_x is not None:
                of_x.addmm_(rows, weight)
        of_x = None if of_x is None else of_x.view_as(x)
        return of_x, None, *(t if t is None else t.to(dtype) for t, dtype in zip(of, ctx.types, strict=True))


def sums(x: Tensor, layers: Sequence[Sum]) -> tuple[Tensor, ...]:
    """Results of layers that take the same `x`, of shape (..., in); each of shape (..., out), in the layers' dtype."""
    given = [tensor for layer in layers for tensor in layer.tensors]
    scalings = tuple(layer.scaling for layer in layers)
    results: tuple[Tensor, ...] = _Sums.apply(x.to(layers[0].dtype), scalings, *given)  # type: ignore[no-untyped-call]
    return results


def version_of(tensor: Tensor) -> int:
    """How often `tensor` was changed, as far as torch counts it."""
    return -1 if tensor.is_inference() else tensor._version
