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


_Found = tuple[tuple[Any, ...], dict[int, tuple[Sum, tuple[int | None, ...], Tensor]]]
"""An input, and what waits for it: of the layer at a place, the sum, the versions of its tensors, and the result."""
_NOTHING: _Found = (), {}


class Siblings:
    """Some layers of one parent, in the order of their calls.

    Their backward pass is one, too: whoever asks for gradients of their results one after the other needs
    `retain_graph`.
    """

    def __init__(self, layers: Iterable[Layer]) -> None:
        self._layers = [weakref.ref(layer) for layer in layers]
        self._found = _NOTHING

    def result(self, layer: Layer, x: Tensor, mine: Sum) -> Tensor:
        """What `layer`, whose sum is `mine`, gives for `x`. Shapes (..., in) to (..., out)."""
        place = next(i for i, ref in enumerate(self._layers) if ref() is layer)
        if place == 0:
            return self._of_all(layer, x, mine)
        given, waiting = self._found  # both at once: another thread may be about to give them another input
        taken = waiting.pop(place, None) if _is(x, given) else None
        if taken is None or not waiting:
            self._found = _NOTHING
        if taken is not None and taken[0].is_the_same(mine) and taken[1] == mine.versions and None not in taken[1]:
            return taken[2]
        return sums(x, [mine])[0]

    def _of_all(self, layer: Layer, x: Tensor, mine: Sum) -> Tensor:
        able = {} if x.is_inference() else self._able(type(layer))  # torch does not count how often it changes
        found = {place: other.sum_for(x) for place, other in able.items()}
        alike = {place: their for place, their in found.items() if their is not None and their.is_like(mine)}
        result, *more = sums(x, [mine, *alike.values()])
        waiting = {p: (their, their.versions, one) for (p, their), one in zip(alike.items(), more, strict=True)}
        self._found = (_input(x), waiting) if waiting else _NOTHING
        return result

    def _able(self, kind: type) -> dict[int, Layer]:
        """The other layers but those that something happens to first: it may have to fetch their weights."""
        others = {place: other for place, ref in enumerate(self._layers) if (other := ref()) is not None and place}
        return {place: other for place, other in others.items() if type(other) is kind and not _is_preceded(other)}


def _is_preceded(layer: Any) -> bool:
    return bool(layer._forward_pre_hooks) or "forward" in vars(layer)


def _input(x: Tensor) -> tuple[Any, ...]:
    return x, version_of(x), torch.is_grad_enabled(), torch.is_inference_mode_enabled()


def _is(x: Tensor, given: tuple[Any, ...]) -> bool:
    return bool(given) and given[0] is x and given[1:] == _input(x)[1:]


_FOUND: weakref.WeakKeyDictionary[Layer, Siblings] = weakref.WeakKeyDictionary()
"""Not held by the layers, so that a copy of one has no siblings."""


def siblings_of(layer: Layer) -> Siblings | None:
    """The layer and those that take the same input; None where it is alone."""
    return _FOUND.get(layer)


def join(layers: Iterable[Layer]) -> None:
    """Let layers that take the same input, in the order of their calls, work together."""
    layers = list(layers)
    _FOUND.update(dict.fromkeys(layers, Siblings(layers)))


def part(layer: Any) -> None:
    """Let a layer work alone again."""
    _FOUND.pop(layer, None)


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
