"""The states of an optimizer, such as Adam's moments, and whether they are finite."""

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

_VISIBLE_IN_WEIGHTS = ("exp_avg", "step")
"""States of the Adam family that need no check while the weights are finite: they are factors of every update, so that
NaN in them, or an infinite momentum, reaches the weights in the same step. An infinite second moment does not."""


class Moments:
    """The floating-point states of `parameters`."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._parameters = parameters
        self._held: list[Any] = []
        self._only_tensors = True
        self._plain: list[Tensor] = []
        self._layout = Layout(self._plain)
        self._others: list[Tensor] = []

    def named(self, optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
        """Every state, named `parameter:state`."""
        return [
            (f"{name}:{key}", value)
            for name, parameter in self._parameters.items()
            for key, value in optimizer.state.get(parameter, {}).items()
            if _counts(value, parameter)
        ]

    def finite(self, optimizer: torch.optim.Optimizer, *, stepped: bool) -> Tensor:
        """A few numbers, shape (n,), all finite only if all states are; does not wait for the device.

        If the optimizer has `stepped` on every parameter, the states in `_VISIBLE_IN_WEIGHTS` are left out.
        """
        if not stepped:
            return norms([t for _, t in self.named(optimizer)], math.inf)
        self._sort(optimizer)
        seen = [total(rows) for rows in self._layout.blocks(self._plain)]
        if self._others:
            seen.append(norms(self._others, math.inf))
        return joined(seen)

    def nonfinite(self, optimizer: torch.optim.Optimizer) -> Names:
        """Names of the states that contain NaN or infinity; waits for the device."""
        named = self.named(optimizer)
        [largest] = to_host([norms([t for _, t in named], math.inf)])
        return Names.of(n for (n, _), value in zip(named, largest, strict=True) if not math.isfinite(value))

    def _sort(self, optimizer: torch.optim.Optimizer) -> None:
        """Sort the states into plain and other tensors, unless they are the same tensors as before."""
        held = list(itertools.chain.from_iterable(state.values() for state in optimizer.state.values()))
        if not self._only_tensors:
            held = [v for v in held if isinstance(v, Tensor)]
        if identical(held, self._held):
            return
        self._only_tensors = all(isinstance(v, Tensor) for v in held)
        self._held = held
        visible = _VISIBLE_IN_WEIGHTS if updates.betas(optimizer) else ()
        counted = [value for name, value in self.named(optimizer) if name.rpartition(":")[2] not in visible]
        # quantised states are tensors of a class of their own, which may not support stacking
        self._plain = [v for v in counted if type(v) is Tensor and v.layout is torch.strided]
        self._others = [v for v in counted if type(v) is not Tensor or v.layout is not torch.strided]
        self._layout = Layout(self._plain)


def _counts(value: object, parameter: Tensor) -> bool:
    # Adam's `step` is a count, and on the host even if the parameters are on a GPU
    return isinstance(value, Tensor) and value.is_floating_point() and value.device == parameter.device
