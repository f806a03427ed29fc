"""Layers of one parent that take the same input: queries, keys and values; gate and up.

Which they are is seen in a forward pass. From then on the first of them that is called finds the results of all, and
each other hands out its own when it is called with that same input; with any other, it works alone.
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
    """A layer whose result may be found together with others'."""

    def sum_for(self, x: Tensor) -> Sum | None:
        """What it adds up for `x`; None where it does anything else."""


class Siblings:
    """Some layers of one parent, in the order of their calls."""

    def __init__(self, layers: Iterable[Layer]) -> None:
        self._first, *self._others = [weakref.ref(layer) for layer in layers]
        self._given: tuple[Any, ...] = ()
        self._waiting: dict[Layer, tuple[Sum, Tensor]] = {}

    def result(self, layer: Layer, x: Tensor, mine: Sum) -> Tensor:
        """What `layer`, whose sum is `mine`, gives for `x`. Shapes (..., in) to (..., out)."""
        if layer is self._first():
            return self._of_all(x, mine)
        if layer in self._waiting and _are(self._given, x):
            known, result = self._waiting.pop(layer)
            if not self._waiting:
                self._given = ()
            if known.is_still(mine):
                return result
        return sums(x, [mine])[0]

    def _of_all(self, x: Tensor, mine: Sum) -> Tensor:
        living = [layer for ref in self._others if (layer := ref()) is not None]
        # a forward of a layer's own may have to fetch its weights first
        found = {layer: layer.sum_for(x) for layer in living if "forward" not in vars(layer)}
        alike = {layer: their for layer, their in found.items() if their is not None and their.is_like(mine)}
        result, *more = sums(x, [mine, *alike.values()])
        self._waiting = dict(zip(alike, zip(alike.values(), more, strict=True), strict=True))
        self._given = _input(x) if alike else ()
        return result


def _input(x: Tensor) -> tuple[Any, ...]:
    return x, version_of(x), torch.is_grad_enabled(), torch.is_inference_mode_enabled()


def _are(given: tuple[Any, ...], x: Tensor) -> bool:
    return given[0] is x and given[1:] == _input(x)[1:]


_FOUND: weakref.WeakKeyDictionary[Layer, Siblings] = weakref.WeakKeyDictionary()
"""Not held by the layers, so that a copy of one has no siblings."""


def siblings_of(layer: Layer) -> Siblings | None:
    """The layer and those that take the same input; None where it is alone."""
    return _FOUND.get(layer)


def join(layers: Iterable[Layer]) -> None:
    """Let layers that take the same input, in the order of their calls, work together."""
    layers = list(layers)
    _FOUND.update(dict.fromkeys(layers, Siblings(layers)))


def find_siblings(layers: Mapping[str, nn.Module], forward: Callable[[], Any]) -> list[list[str]]:
    """Names of those of `layers` that share a parent and an input in a forward pass, in the order of their calls."""
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
    for name, x in calls:  # they are held, so that no two have the same id
        found[name.rpartition(".")[0], id(x)].append(name)
    return [names for names in found.values() if len(names) > 1 and all(times[name] == 1 for name in names)]
