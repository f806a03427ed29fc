"""Siblings: layers of one parent that take the same input, such as queries, keys and values, or gate and up.

A forward pass shows which they are. From then on the first one that is called computes the results of all. Each other
one returns its own when it is called with the same input, and computes alone when it is called with another.
"""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .sums import Sum, sums, version_of


class Layer(Protocol):
    """A layer whose result may be computed together with those of others."""

    def sum_for(self, x: Tensor) -> Sum | None:
        """Return the sum that it computes for `x`; None where it computes anything else."""


_Found = tuple[tuple[Any, ...], dict[int, tuple[Sum, tuple[int | None, ...], Tensor]]]
"""An input, and by the place of a layer the results for it: its sum, the versions of its tensors, and the result."""
_NOTHING: _Found = (), {}


class Siblings:
    """Layers that take the same input, in the order of their calls.

    They share one backward pass: asking for the gradients of their results one by one needs `retain_graph`.
    """

    def __init__(self, layers: Iterable[Layer]) -> None:
        self._layers = [weakref.ref(layer) for layer in layers]
        self._found = _NOTHING

    def result(self, layer: Layer, x: Tensor, mine: Sum) -> Tensor:
        """Return the result of `layer`, whose sum is `mine`, for `x`. Shapes (..., in) to (..., out)."""
        place = next(i for i, ref in enumerate(self._layers) if ref() is layer)
        if place == 0:
            return self._of_all(layer, x, mine)
        # read at once: another thread may be about to replace both
        given, waiting = self._found
        taken = waiting.pop(place, None) if _is_same(x, given) else None
        if taken is None or not waiting:
            self._found = _NOTHING
        if taken is not None and taken[0].is_the_same(mine) and taken[1] == mine.versions and None not in taken[1]:
            return taken[2]
        return sums(x, [mine])[0]

    def _of_all(self, layer: Layer, x: Tensor, mine: Sum) -> Tensor:
        # torch counts no versions of inference tensors, so a change between the calls would go unnoticed
        able = {} if x.is_inference() else self._able(type(layer))
        found = {place: other.sum_for(x) for place, other in able.items()}
        alike = {place: their for place, their in found.items() if their is not None and their.is_like(mine)}
        result, *more = sums(x, [mine, *alike.values()])
        waiting = {p: (their, their.versions, one) for (p, their), one in zip(alike.items(), more, strict=True)}
        self._found = (_input(x), waiting) if waiting else _NOTHING
        return result

    def _able(self, layer_type: type) -> dict[int, Layer]:
        """Return the other layers, but those with a hook that runs first: it may have to fetch their weights."""
        others = {place: other for place, ref in enumerate(self._layers) if (other := ref()) is not None and place}
        return {p: other for p, other in others.items() if type(other) is layer_type and not _has_pre_hook(other)}


def _has_pre_hook(layer: Any) -> bool:
    return bool(layer._forward_pre_hooks) or "forward" in vars(layer)


def _input(x: Tensor) -> tuple[Any, ...]:
    return x, version_of(x), torch.is_grad_enabled(), torch.is_inference_mode_enabled()


def _is_same(x: Tensor, given: tuple[Any, ...]) -> bool:
    return bool(given) and given[0] is x and given[1:] == _input(x)[1:]


_FOUND: weakref.WeakKeyDictionary[Layer, Siblings] = weakref.WeakKeyDictionary()
"""Kept outside of the layers, so that a copy of one has no siblings."""


def siblings_of(layer: Layer) -> Siblings | None:
    """Return the group that a layer belongs to; None where it has no siblings."""
    return _FOUND.get(layer)


def join(layers: Iterable[Layer]) -> None:
    """Let layers that take the same input, given in the order of their calls, compute together."""
    layers = list(layers)
    _FOUND.update(dict.fromkeys(layers, Siblings(layers)))


def part(layer: Any) -> None:
    """Let a layer compute alone again."""
    _FOUND.pop(layer, None)


def find_siblings(layers: Mapping[str, nn.Module], forward: Callable[[], Any]) -> list[list[str]]:
    """Return the names of `layers` that share a parent and an input in a forward pass, in the order of their calls."""
    calls: list[tuple[str, Tensor]] = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, given, name=name: calls.extend((name, x) for x in given[:1]))
        for name, layer in layers.items()
    ]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    times = Counter(name for name, _ in calls)
    found = defaultdict(list)
    # `calls` holds the inputs, so no two have the same id
    for name, x in calls:
        found[name.rpartition(".")[0], id(x)].append(name)
    return [names for names in found.values() if len(names) > 1 and all(times[name] == 1 for name in names)]
