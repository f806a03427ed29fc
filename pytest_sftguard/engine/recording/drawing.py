"""Whether a function draws random numbers: the states of all generators that it can reach, before and after a call."""

from __future__ import annotations

import functools
import inspect
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

_DEPTH = 4
"""Steps from a function to a generator: a closure, the object in it, its attribute."""
_VISITED = 400
"""Objects that are looked through: those that a usual collator holds."""


class Generators:
    """The generators that a call of `function` may draw from: the global ones of the host, and those that it holds.

    One that it makes in the call itself, with a seed of its own, is not seen.
    """

    def __init__(self, function: Any) -> None:
        self._held = list(_held(function))

    def states(self) -> tuple[Any, ...]:
        """Their present states, to be compared by `moved`."""
        return torch.get_rng_state(), random.getstate(), _state(np.random), *map(_state, self._held)

    def moved(self, before: tuple[Any, ...]) -> bool:
        """Whether one of them has drawn since the states `before`."""
        return not all(_equal(a, b) for a, b in zip(before, self.states(), strict=True))


def _held(function: Any) -> Iterator[Any]:
    seen: set[int] = set()
    waiting = [(function, 0)]
    while waiting and len(seen) < _VISITED:
        thing, depth = waiting.pop(0)
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)):
            yield thing
        elif depth < _DEPTH:
            waiting += [(part, depth + 1) for part in _parts(thing)]


def _parts(thing: Any) -> list[Any]:
    """What a function or an object holds."""
    if isinstance(thing, functools.partial):
        return [thing.func, *thing.args, *thing.keywords.values()]
    if inspect.ismethod(thing):
        return [thing.__self__, thing.__func__]
    if inspect.isfunction(thing):
        cells = [content for c in thing.__closure__ or () for content in _content(c)]
        named = [thing.__globals__.get(n) for n in thing.__code__.co_names]
        generators = [g for g in named if isinstance(g, (torch.Generator, np.random.Generator, random.Random))]
        return [*cells, *(thing.__defaults__ or ()), *generators]
    if isinstance(thing, (torch.Tensor, nn.Module, type, str, bytes)) or inspect.ismodule(thing):
        return []
    if isinstance(thing, Mapping):
        return list(thing.values()) if len(thing) < _VISITED else []
    if isinstance(thing, (list, tuple)):
        return list(thing) if len(thing) < _VISITED else []
    return list(vars(thing).values()) if hasattr(thing, "__dict__") else []


def _content(cell: Any) -> list[Any]:
    """The value of a variable of a closure, which may have none yet."""
    try:
        return [cell.cell_contents]
    except ValueError:
        return []


def _state(generator: Any) -> Any:
    """The state of a generator, or of numpy's global one, as `_equal` compares it."""
    if isinstance(generator, np.random.Generator):
        return repr(generator.bit_generator.state)
    if isinstance(generator, random.Random):
        return generator.getstate()
    state = generator.get_state()
    return state if isinstance(state, torch.Tensor) else state[1:3]


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, tuple) and a and isinstance(a[0], np.ndarray):
        return bool(a[1] == b[1] and np.array_equal(a[0], b[0]))
    return bool(a == b)
