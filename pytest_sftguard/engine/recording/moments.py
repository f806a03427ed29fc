"""What an optimizer keeps beside the parameters: its states, and whether they are finite."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pytest_sftguard.engine.recording import updates
from pytest_sftguard.engine.tensors.layouts import Layout, joined, total
from pytest_sftguard.engine.tensors.reductions import identical, norms, to_host
from pytest_sftguard.records import Names

_SHOWN = ("exp_avg", "step")
"""States of Adam's kin that are asked only where something else is wrong: they are factors of each step's update, so
that NaN in them, or an infinite momentum, is in the weights after the same step. An infinite second moment stops them.
"""


class Moments:
    """The floating-point states that belong to `parameters`."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._parameters = parameters
        self._held: list[Any] = []
        self._tensors_alone = True
        self._plain: list[Tensor] = []
        self._layout = Layout(self._plain)
        self._others: list[Tensor] = []

    def named(self, optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
        """Every state, as `parameter:state`."""
        return [
            (f"{name}:{key}", value)
            for name, parameter in self._parameters.items()
            for key, value in optimizer.state.get(parameter, {}).items()
            if _counts(value, parameter)
        ]

    def finite(self, optimizer: torch.optim.Optimizer, *, stepped: bool) -> Tensor:
        """A few numbers, all of them finite only where all states are; nothing is waited for.

        Where the optimizer has `stepped` on every parameter, those states are left out that then show in the weights:
        see `_SHOWN`.
        """
        if not stepped:
            return norms([t for _, t in self.named(optimizer)], math.inf)
        self._sort(optimizer)
        seen = [total(rows) for rows in self._layout.blocks(self._plain)]
        if self._others:
            seen.append(norms(self._others, math.inf))
        return joined(seen)

    def nonfinite(self, optimizer: torch.optim.Optimizer) -> Names:
        """The states that hold NaN or infinity; waits for the device."""
        named = self.named(optimizer)
        [largest] = to_host([norms([t for _, t in named], math.inf)])
        return Names.of(n for (n, _), value in zip(named, largest, strict=True) if not math.isfinite(value))

    def _sort(self, optimizer: torch.optim.Optimizer) -> None:
        """Sort the states by how they can be looked at, unless they are the tensors that have been sorted before."""
        held = list(itertools.chain.from_iterable(state.values() for state in optimizer.state.values()))
        if not self._tensors_alone:
            held = [v for v in held if isinstance(v, Tensor)]
        if identical(held, self._held):
            return
        self._tensors_alone = all(isinstance(v, Tensor) for v in held)
        self._held = held
        shown = _SHOWN if updates.betas(optimizer) else ()
        counted = [value for name, value in self.named(optimizer) if name.rpartition(":")[2] not in shown]
        # quantised states are tensors of a class of their own, which need not know how to be stacked
        self._plain = [v for v in counted if type(v) is Tensor and v.layout is torch.strided]
        self._others = [v for v in counted if type(v) is not Tensor or v.layout is not torch.strided]
        self._layout = Layout(self._plain)


def _counts(value: object, parameter: Tensor) -> bool:
    # Adam's `step` stays on the host beside parameters on a GPU, and is a count
    return isinstance(value, Tensor) and value.is_floating_point() and value.device == parameter.device
