"""How far an optimizer of Adam's kin moved its tensors, in learning rates."""

from __future__ import annotations

import functools
import math
import re
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

_KIN = re.compile(r"(Paged|Fused|CPU|DeepSpeedCPU|AnyPrecision)?AdamW?(4bit|8bit|32bit|Fp8)?")
"""Classes whose update is a first moment over the root of a second one: Adam, AdamW, PagedAdamW8bit, FusedAdam, ..."""


def betas(optimizer: torch.optim.Optimizer) -> tuple[float, ...]:
    """Decay rates of the moments, of the group that can move furthest; empty where it is none of Adam's kin."""
    if not _kin(tuple(kind.__name__ for kind in type(optimizer).__mro__)):
        return ()
    pairs = [tuple(float(b) for b in group["betas"]) for group in optimizer.param_groups if "betas" in group]
    return max(
        (p for p in pairs if len(p) == 2), key=lambda p: (1 - p[0]) / math.sqrt(max(1 - p[1], 1e-12)), default=()
    )


def largest(
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, Tensor],
    moved: Sequence[float],
    before: Sequence[float],
    after: Sequence[float],
) -> tuple[float | None, str]:
    """The largest change of an element in learning rates of its own group, and the tensor that it is in.

    `moved`, `before` and `after` are each tensor's largest absolute change and its largest absolute element before and
    after. What weight decay and one rounding in the tensor's type explain is taken off. None where the optimizer is
    none of Adam's kin; NaN where a change is.
    """
    if not betas(optimizer):
        return None, ""
    rates: dict[int, tuple[float, float]] = {}
    for group in optimizer.param_groups:
        of_group = float(group["lr"]), float(group.get("weight_decay") or 0.0)
        rates.update(dict.fromkeys(map(id, group["params"]), of_group))
    worst, where = 0.0, ""
    for (name, parameter), change, old, new in zip(parameters.items(), moved, before, after, strict=True):
        rate, decay = rates.get(id(parameter), (0.0, 0.0))
        if change <= worst * rate:  # what is taken off would only make it less
            continue
        if math.isnan(change):
            return math.nan, name
        rest = change - rate * decay * old - _eps(parameter.dtype) * (old if old > new else new)
        if rest > worst * rate and (ratio := _ratio(rest, rate)) > worst:
            worst, where = ratio, name
    return worst, where


@functools.cache
def _kin(names: tuple[str, ...]) -> bool:
    return any(map(_KIN.fullmatch, names))


@functools.cache
def _eps(dtype: torch.dtype) -> float:
    return float(torch.finfo(dtype).eps)


def _ratio(change: float, rate: float) -> float:
    if not change > 0:
        return 0.0
    return min(change / rate, sys.float_info.max) if rate > 0 else sys.float_info.max
