"""What an optimizer keeps beside the parameters: its states, and whether they are finite."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pytest_sftguard.engine.packed import Layout, joined, total
from pytest_sftguard.engine.tensors import norms, to_host
from pytest_sftguard.records import Names


class Moments:
    """The floating-point states that belong to `parameters`."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._parameters = parameters
        self._held: list[Any] = []
        self._tensors_alone = True
        self._alike: list[tuple[list[int], list[Tensor]]] = []
        self._scalars: list[Tensor] = []
        self._others: list[Tensor] = []

    def named(self, optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
        """Every state, as `parameter:state`."""
        return [
            (f"{name}:{key}", value)
            for name, parameter in self._parameters.items()
            for key, value in optimizer.state.get(parameter, {}).items()
            if _counts(value, parameter)
        ]

    def finite(self, optimizer: torch.optim.Optimizer, layout: Layout) -> Tensor:
        """A few numbers, all of them finite only where all states are; nothing is waited for.

        `layout` is that of the parameters.
        """
        self._sort(optimizer, layout)
        seen = [total(rows) for places, states in self._alike for rows in layout.laid(states, places)]
        if self._scalars:
            seen.append(torch.stack(self._scalars).sum().reshape(1))
        if self._others:
            seen.append(norms(self._others, math.inf))
        return joined(seen)

    def nonfinite(self, optimizer: torch.optim.Optimizer) -> Names:
        """The states that hold NaN or infinity; waits for the device."""
        named = self.named(optimizer)
        [largest] = to_host([norms([t for _, t in named], math.inf)])
        return Names.of(n for (n, _), value in zip(named, largest, strict=True) if not math.isfinite(value))

    def _sort(self, optimizer: torch.optim.Optimizer, layout: Layout) -> None:
        """Sort the states by how they can be looked at, unless they are the tensors that have been sorted before."""
        held = list(itertools.chain.from_iterable(state.values() for state in optimizer.state.values()))
        if not self._tensors_alone:
            held = [v for v in held if isinstance(v, Tensor)]
        if len(held) == len(self._held) and all(map(operator.is_, held, self._held)):
            return
        self._tensors_alone = all(isinstance(v, Tensor) for v in held)
        self._held, self._alike, self._scalars, self._others = held, [], [], []
        alike: dict[str, tuple[list[int], list[Tensor]]] = {}
        for place, parameter in enumerate(self._parameters.values()):
            for key, value in optimizer.state.get(parameter, {}).items():
                if not _counts(value, parameter):
                    continue
                if layout.takes([value], [place]):
                    places, tensors = alike.setdefault(key, ([], []))
                    places.append(place)
                    tensors.append(value)
                elif value.dim() == 0 and value.dtype == torch.float32 and value.device == parameter.device:
                    self._scalars.append(value)
                else:
                    self._others.append(value)
        self._alike = list(alike.values())


def _counts(value: object, parameter: Tensor) -> bool:
    # Adam's `step` stays on the host beside parameters on a GPU, and is a count
    return isinstance(value, Tensor) and value.is_floating_point() and value.device == parameter.device
