"""Whether the gradients of LoRA's two factors fit together.

A loss that knows the factors A and B through their product B A alone has gradients G A^T for B and B^T G for A, with
the same G, the gradient for the product. So A times the transposed gradient of A, and the transposed gradient of B
times B, are the same matrix of r x r elements, whatever the model and the loss are. What changes the gradient of one
factor only, or exchanges or freezes entries, parts the two.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pytest_sftguard.engine.adapter.adapters import lora_layers
from pytest_sftguard.engine.recording.sampling import sampled

_NUMBERS = 4
_ELEMENTS = 1 << 20
"""Elements of the factors that are copied at a time: with their gradients 8 MiB in float32."""
_PRODUCT_ALONE = ("Dora", "ALora")
"""Variants of LoRA in which the output still depends on the factors through their product alone."""


@dataclass(frozen=True)
class _Pair:
    layer: str
    down: Tensor
    """A, shape (r, ...)."""
    up: Tensor
    """B, shape (out, r) or (out, r, 1, 1)."""


@dataclass(frozen=True)
class Mismatch:
    """The layer whose two gradients fit together least."""

    layer: str
    """Its name."""
    share: float
    """Norm of the difference of the two matrices, relative to the largest that the norms of the factors and gradients
    allow."""
    bounded: bool
    """Whether hooks seem to bound the elements of the gradients."""


class Factors:
    """Finds the layers of `model` with two trainable factors, and compares their gradients."""

    def __init__(self, model: nn.Module, parameters: dict[str, Tensor]) -> None:
        self._pairs = list(_pairs(model, parameters))
        self._groups = list(_alike(self._pairs))
        self._seen: list[_Pair] = []

    @torch.no_grad()
    def products(self, step: int) -> Tensor:
        """Numbers for `mismatch`, on the device of the factors; none in a step that is not looked at."""
        self._seen = []
        if not self._pairs or not sampled(step):
            return torch.empty(0)
        found = []
        for group in self._groups:
            pairs = [p for p in group if p.down.grad is not None and p.up.grad is not None]
            if pairs:
                found.append(_compared(pairs))
                self._seen += pairs
        return torch.cat([f.to(found[0].device) for f in found]).flatten() if found else torch.empty(0)

    def mismatch(self, numbers: Sequence[float]) -> Mismatch | None:
        """The worst layer by the `numbers` of `products`; None if none was looked at, or a gradient is not finite.

        A layer counts by its own size down to a tenth of the largest: in float16, smaller gradients underflow.
        """
        rows = [numbers[i : i + _NUMBERS] for i in range(0, len(numbers), _NUMBERS)]
        if not rows or not all(map(math.isfinite, numbers)):
            return None
        least = 0.1 * max(row[1] for row in rows)
        sizes = [(p.layer, row[0], max(row[1], least)) for p, row in zip(self._seen, rows, strict=True)]
        shares = {layer: apart / size for layer, apart, size in sizes if size > 0}
        layer = max(shares, key=lambda n: shares[n], default="")
        bounded = _shared([x for row in rows for x in row[2:]])
        return Mismatch(layer, shares.get(layer, 0.0), self._hooked() and bounded)

    def _hooked(self) -> bool:
        return any(getattr(t, "_backward_hooks", None) for p in self._pairs for t in (p.down, p.up))


def _shared(sizes: Sequence[float]) -> bool:
    """Whether several tensors have the largest of `sizes`, to the bit, which is a bound then."""
    most = max(sizes)
    return most > 0 and sizes.count(most) > 1


def _compared(pairs: Sequence[_Pair]) -> Tensor:
    """Norm of each pair's difference, the largest possible one, and its gradients' maxima: shape (pairs, 4)."""
    # wider than that only where the training is: its own roundings are in the gradients already
    wide = torch.promote_types(pairs[0].down.dtype, torch.float32)
    a, up = _stacked([p.down for p in pairs], wide), _stacked([p.up for p in pairs], wide)
    ga, gup = (_stacked([t.grad for t in ts], wide) for ts in ([p.down for p in pairs], [p.up for p in pairs]))
    apart = _norms(a @ ga.mT - gup.mT @ up)
    most = _norms(a) * _norms(ga) + _norms(up) * _norms(gup)
    return torch.stack([apart, most, *(g.abs().amax((1, 2)) for g in (ga, gup))], 1)


def _stacked(tensors: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor:
    return torch.stack([t.detach().flatten(1).to(dtype) for t in tensors if t is not None])


def _norms(matrices: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.matrix_norm(matrices)
    return norms


def _pairs(model: nn.Module, parameters: dict[str, Tensor]) -> Iterator[_Pair]:
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    learning = {id(p) for p in parameters.values()}
    for name, layer in lora_layers(model).items():
        if hasattr(layer, "parameter_name"):
            continue
        for adapter, down, up in _factors(layer):
            variant = type(getattr(layer, "lora_variant", {}).get(adapter)).__name__
            if variant != "NoneType" and not variant.startswith(_PRODUCT_ALONE):
                continue
            pair = (down, up)
            fit = all(t.dim() >= 2 and t.layout is torch.strided for t in pair)
            if (
                fit
                and down.shape[0] == up.shape[1] == up[0].numel()
                and all(id(t) in learning and uses[id(t)] == 1 for t in pair)
            ):
                yield _Pair(name, down, up)


def _factors(layer: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    # in AdaLoRA, whose factors are a ParameterDict, a penalty on each of them is part of the loss
    for down, up, held_in in (
        ("lora_A", "lora_B", nn.ModuleDict),
        ("lora_embedding_A", "lora_embedding_B", nn.ParameterDict),
    ):
        first, second = getattr(layer, down, None), getattr(layer, up, None)
        if not isinstance(first, held_in) or not isinstance(second, held_in):
            continue
        for adapter in first.keys() & second.keys():
            a, b = (getattr(held[adapter], "weight", held[adapter]) for held in (first, second))
            if isinstance(a, Tensor) and isinstance(b, Tensor):
                yield adapter, a, b


def _alike(pairs: Sequence[_Pair]) -> Iterator[list[_Pair]]:
    """The pairs of equal shapes and types, in groups of bounded size."""
    alike: dict[object, list[_Pair]] = {}
    for pair in pairs:
        key = tuple((t.flatten(1).shape, t.dtype, t.device) for t in (pair.down, pair.up))
        alike.setdefault(key, []).append(pair)
    for group in alike.values():
        size = max(1, _ELEMENTS // max(1, group[0].down.numel() + group[0].up.numel()))
        for start in range(0, len(group), size):
            yield group[start : start + size]
