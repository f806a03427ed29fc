"""How far an optimizer of Adam's kin moved its tensors, in learning rates."""

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

_KIN = re.compile(r"(Paged|Fused|CPU|DeepSpeedCPU|AnyPrecision)?AdamW?(4bit|8bit|32bit|Fp8)?")
"""Classes whose update is a first moment over the root of a second one: Adam, AdamW, PagedAdamW8bit, FusedAdam, ..."""


def betas(optimizer: torch.optim.Optimizer) -> tuple[float, ...]:
    """Decay rates of the moments, of the group that can move furthest; empty where it is none of Adam's kin."""
    if not _kin(type(optimizer).__mro__):
        return ()
    pairs = [tuple(float(b) for b in group["betas"]) for group in optimizer.param_groups if "betas" in group]
    return max(
        (p for p in pairs if len(p) == 2), key=lambda p: (1 - p[0]) / math.sqrt(max(1 - p[1], 1e-12)), default=()
    )


class Groups:
    """Which of an optimizer's groups each of some tensors belongs to."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self._held: list[list[Tensor]] = []
        self._group_of: list[int] = []

    def rates(self, optimizer: torch.optim.Optimizer) -> Rates | None:
        """What the groups have now; None where the optimizer is none of Adam's kin."""
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
    """Learning rates and weight decays of some tensors, in one step."""

    group_of: Sequence[int]
    """The place of each tensor's group; -1 where none holds it."""
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
    """The largest change of an element in learning rates of its own group, and the tensor that it is in.

    `moved`, `before` and `after` are each tensor's largest absolute change and its largest absolute element before and
    after. What weight decay and one rounding in the tensor's type explain is taken off. None where there are no
    `rates`; NaN where a change is.
    """
    if rates is None:
        return None, ""
    of_groups = (*rates.of_groups, (0.0, 0.0))
    worst, where = 0.0, ""
    every = zip(names, dtypes, rates.group_of, moved, before, after, strict=True)
    for name, dtype, group, change, old, new in every:
        rate, decay = of_groups[group]
        if change <= worst * rate:  # what is taken off would only make it less
            continue
        if math.isnan(change):
            return math.nan, name
        rest = change - rate * decay * old - _eps(dtype) * (old if old > new else new)
        if rest > worst * rate and (ratio := _ratio(rest, rate)) > worst:
            worst, where = ratio, name
    return worst, where


@functools.lru_cache(maxsize=64)
def _kin(classes: tuple[type, ...]) -> bool:
    return any(_KIN.fullmatch(kind.__name__) for kind in classes)


@functools.cache
def _eps(dtype: torch.dtype) -> float:
    return float(torch.finfo(dtype).eps)


def _ratio(change: float, rate: float) -> float:
    if not change > 0:
        return 0.0
    return min(change / rate, sys.float_info.max) if rate > 0 else sys.float_info.max
