"""Records of steps, made of the numbers that each of them left.

A training step pushes all other code out of the processor's caches; the first call of anything after it takes five
times as long as the next ones. Nobody asks for the record of a step before the training is over, so that a step leaves
its numbers, and the records of dozens are made together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pytest_sftguard.engine.recording import updates
from pytest_sftguard.engine.tensors.layouts import ordered
from pytest_sftguard.records import NONE, Names, StepRecord

_TOGETHER = 64
"""Steps that wait, with a few hundred numbers each."""


@dataclass(slots=True, kw_only=True)
class Numbers:
    """What one step left: numbers that are on the host, and what they are of."""

    order: Sequence[int]
    """Of `update` and `weights`: that of a layout's blocks, which would keep its memory alive."""
    scale: list[float]
    """Of the loss, before and after; empty where none is scaled."""
    scale_after: list[float]
    loss: list[float]
    """What the loop adds up, by micro-batch."""
    micro: list[float]
    """The raw loss of each micro-batch."""
    there: list[int]
    """Places of the parameters that have a gradient."""
    order_of_gradients: Sequence[int] | None
    """Of `norm` and `most`; None where the gradients were not seen."""
    norm: list[float]
    """L2 norm of each gradient."""
    most: list[float]
    """The largest element of each."""
    moved: list[float]
    """How far the weights were changed before the step; empty where there was none before."""
    stale_names: list[str]
    """Parameters that had a gradient when the step began, and its largest element."""
    stale: list[float]
    update: list[float]
    """The largest change of each tensor, and its largest element after the step."""
    weights: list[float]
    given: list[float]
    """Parts of the L2 norm of the gradients that the optimizer got."""
    received: bool
    """Whether these were seen."""
    rates: updates.Rates | None
    dtypes: Sequence[torch.dtype]
    """Types of the parameters."""
    idle: list[str]
    """Tensors of layers that no token of the step passed through."""
    nonfinite_moments: Names
    learning_rate: float | None
    seconds: float | None
    memory: int | None


class Gathered:
    """Takes the numbers of one step after the other; `weights` are the largest elements of the tensors before them."""

    def __init__(self, names: list[str], weights: list[float]) -> None:
        self._names, self._weights = names, weights
        self._waiting: list[Numbers] = []
        self._records: list[StepRecord] = []
        self._first_norms: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._records) + len(self._waiting)

    def add(self, numbers: Numbers) -> None:
        """Another step is done."""
        self._waiting.append(numbers)
        if len(self._waiting) >= _TOGETHER:
            self.records()

    def records(self) -> list[StepRecord]:
        """Every step so far, but for the rows and tokens of its micro-batches."""
        for numbers in self._waiting:
            self._records.append(self._record(numbers))
        self._waiting = []
        return self._records

    def first_norms(self) -> dict[str, float]:
        """L2 norms of the gradients of the first step in which all were finite, by parameter."""
        self.records()
        return self._first_norms

    def _record(self, seen: Numbers) -> StepRecord:
        update, weights = ordered(seen.order, seen.update), ordered(seen.order, seen.weights)
        with_gradient, most = self._of_gradients(seen, seen.most)
        if not self._first_norms and finite(seen.norm):
            self._first_norms = dict(zip(*self._of_gradients(seen, seen.norm), strict=True))
        sound = finite(weights)  # nearly always, so that nothing needs to be asked of each
        usable = [True] * len(weights) if sound else [math.isfinite(w) for w in weights]
        ratio, furthest = updates.largest(seen.rates, seen.dtypes, self._names, update, self._weights, weights)
        self._weights = weights
        return StepRecord(
            step=len(self._records) + 1,
            micro_losses=tuple(seen.micro),
            loss=_added_up(seen.loss),
            grad_norm=None if seen.order_of_gradients is None else _hypot(seen.norm),
            max_abs_gradient=None if seen.order_of_gradients is None else _largest(most),
            nonfinite_gradients=NONE if finite(most) else _named(with_gradient, most, lambda v: not math.isfinite(v)),
            missing_gradients=self._missing_gradients(seen),
            zero_gradients=_zeros(with_gradient, most),
            learning_rate=seen.learning_rate,
            loss_scale=seen.scale[0] if seen.scale else None,
            loss_scale_after=seen.scale_after[0] if seen.scale_after else None,
            changed=sum(f and u > 0 for f, u in zip(usable, update, strict=True)),
            unchanged=_zeros(self._names, update),
            stale_gradients=_named(seen.stale_names, seen.stale, lambda v: v != 0),
            max_change_before=_largest(seen.moved) if seen.moved else None,
            idle=Names.of(seen.idle),
            nonfinite_weights=NONE if sound else _named(self._names, weights, lambda v: not math.isfinite(v)),
            nonfinite_moments=seen.nonfinite_moments,
            max_update=_largest(update),
            max_update_ratio=ratio,
            max_update_tensor=furthest,
            received_grad_norm=_hypot(seen.given) if seen.received else None,
            seconds=seen.seconds,
            peak_memory_bytes=seen.memory,
        )

    def _of_gradients(self, seen: Numbers, numbers: list[float]) -> tuple[list[str], list[float]]:
        """Names of the parameters that have a gradient, and of `numbers` the one of each, in the same order."""
        if seen.order_of_gradients is None:
            return [], []
        placed = ordered(seen.order_of_gradients, numbers)
        if len(placed) != len(seen.there):
            placed = [placed[i] for i in seen.there]
        return [self._names[i] for i in seen.there], placed

    def _missing_gradients(self, seen: Numbers) -> Names:
        if seen.order_of_gradients is None or len(seen.there) == len(self._names):
            return NONE
        there = set(seen.there)
        return Names.of(n for i, n in enumerate(self._names) if i not in there)


def finite(values: list[float]) -> bool:
    """Whether all of `values` are finite, but for sums that overflow: what is not is found out one by one."""
    return math.isfinite(sum(values))


def _added_up(losses: list[float]) -> float | None:
    if not losses:
        return None
    return math.fsum(losses) if all(map(math.isfinite, losses)) else math.nan


def _named(names: list[str], values: list[float], flagged: Callable[[float], Any]) -> Names:
    return Names.of(n for n, v in zip(names, values, strict=True) if flagged(v))


def _zeros(names: list[str], values: list[float]) -> Names:
    return _named(names, values, lambda v: v == 0) if 0.0 in values else NONE


def _largest(values: list[float]) -> float:
    """The largest value, NaN if there is one: `max` would drop it or keep it by its place."""
    if not finite(values) and any(math.isnan(v) for v in values):
        return math.nan
    return max(values, default=0.0)


def _hypot(values: list[float]) -> float:
    if not finite(values) and any(math.isnan(v) for v in values):
        return math.nan
    return math.hypot(*values)
