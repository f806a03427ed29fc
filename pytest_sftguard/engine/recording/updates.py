"""Updates of an optimizer of the Adam family, in units of the learning rate."""

from __future__ import annotations

import functools
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pytest_sftguard.engine.tensors.reductions import identical

_ADAM_FAMILY = re.compile(r"(Paged|Fused|CPU|DeepSpeedCPU|AnyPrecision)?AdamW?(4bit|8bit|32bit|Fp8)?")
"""Classes that divide a first moment by the root of a second one: Adam, AdamW, PagedAdamW8bit, FusedAdam, ..."""


def betas(optimizer: torch.optim.Optimizer) -> tuple[float, ...]:
    """Decay rates of the group with the largest possible update; empty outside the Adam family."""
    if not _is_adam(type(optimizer).__mro__):
        return ()
    every = [tuple(float(b) for b in group["betas"]) for group in optimizer.param_groups if "betas" in group]
    pairs = [b for b in every if len(b) == 2]
    return max(pairs, key=lambda b: (1 - b[0]) / math.sqrt(max(1 - b[1], 1e-12)), default=())


class Groups:
    """The parameter group of each of `tensors`, found again only when the groups change."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self._held: list[list[Tensor]] = []
        self._group_of: list[int] = []

    def rates(self, optimizer: torch.optim.Optimizer) -> Rates | None:
        """Present rates of the groups; None outside the Adam family."""
        if not betas(optimizer):
            return None
        groups = optimizer.param_groups
        held = [group["params"] for group in groups]
        if len(held) != len(self._held) or not all(map(identical, held, self._held)):
            self._held = [list(tensors) for tensors in held]
            places = {id(t): i for i, tensors in enumerate(held) for t in tensors}
            self._group_of = [places.get(id(t), -1) for t in self._tensors]
        return Rates(self._group_of, [(float(g["lr"]), float(g.get("weight_decay") or 0.0)) for g in groups])


@dataclass(frozen=True)
class Rates:
    """Learning rates and weight decays of tensors in one step."""

    group_of: Sequence[int]
    """Index of each tensor's group; -1 if no group has it."""
    of_groups: Sequence[tuple[float, float]]
    """Learning rate and weight decay of each group."""


def largest(
    rates: Rates | None,
    dtypes: Sequence[torch.dtype],
    names: Sequence[str],
    moved: Sequence[float],
    before: Sequence[float],
    after: Sequence[float],
) -> tuple[float | None, str]:
    """Largest change of an element in units of its group's learning rate, and the name of its tensor.

    `moved`, `before` and `after` are each tensor's largest absolute change, and its largest absolute element before and
    after the step. The change that weight decay and one rounding explain is subtracted. None without `rates`, NaN if a
    change is NaN.
    """
    if rates is None:
        return None, ""
    of_groups = (*rates.of_groups, (0.0, 0.0))
    worst, where = 0.0, ""
    every = zip(names, dtypes, rates.group_of, moved, before, after, strict=True)
    for name, dtype, group, change, old, new in every:
        rate, decay = of_groups[group]
        # subtraction would only make it smaller
        if change <= worst * rate:
            continue
        if math.isnan(change):
            return math.nan, name
        rest = change - rate * decay * old - _eps(dtype) * (old if old > new else new)
        if rest > worst * rate and (ratio := _ratio(rest, rate)) > worst:
            worst, where = ratio, name
    return worst, where


@functools.lru_cache(maxsize=64)
def _is_adam(classes: tuple[type, ...]) -> bool:
    return any(_ADAM_FAMILY.fullmatch(class_.__name__) for class_ in classes)


@functools.cache
def _eps(dtype: torch.dtype) -> float:
    return float(torch.finfo(dtype).eps)


def _ratio(change: float, rate: float) -> float:
    if not change > 0:
        return 0.0
    return min(change / rate, sys.float_info.max) if rate > 0 else sys.float_info.max
