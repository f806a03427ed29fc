"""Step records, made together from the numbers of dozens of steps.

A training step evicts all other code from the processor's caches, so that the first call of any function after it takes
five times as long as the next ones. Nobody reads the record of a step before the training is over. So a step only
stores its numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pytest_sftguard.engine.recording import received, updates
from pytest_sftguard.engine.recording.descent import Direction
from pytest_sftguard.engine.recording.factors import Mismatch
from pytest_sftguard.engine.recording.stepping import Departure
from pytest_sftguard.engine.tensors.layouts import ordered
from pytest_sftguard.records import NONE, Names, StepRecord

_BATCHED_STEPS = 64
"""Steps whose records are made together, from a few hundred numbers each."""


@dataclass(slots=True, kw_only=True)
class Numbers:
    """The numbers of one step, on the host."""

    order: Sequence[int]
    """Indices of the tensors in `update` and `weights`; not the layout itself, whose memory it would keep alive."""
    scale: list[float]
    """Loss scale before the step; empty without one."""
    scale_after: list[float]
    """Loss scale after the step; empty without one."""
    loss: list[float]
    """Summands of the step's loss, one for each micro-batch."""
    micro: list[float]
    """Raw loss of each micro-batch."""
    own: list[float]
    """The loss that the model itself computed in each micro-batch; empty where it did not in all of them."""
    offsets: list[bool]
    """Whether the loss of each micro-batch is that with a number added; empty where none is."""
    places: list[int]
    """Indices of the parameters that have a gradient."""
    gradient_order: Sequence[int] | None
    """Indices of the tensors in `norm` and `most`; None if the gradients were not seen."""
    norm: list[float]
    """L2 norm of each gradient."""
    signed: list[float]
    """Sum of each gradient's elements under fixed random signs."""
    most: list[float]
    """Largest absolute element of each gradient."""
    moved: list[float]
    """Changes of the weights since the previous step, of which the largest counts; empty in the first step."""
    stale_names: list[str]
    """Names of the parameters that had a gradient when the step began."""
    cleared: bool
    """Whether gradients of the step were there after one micro-batch and gone in a later one."""
    stale: list[float]
    """Largest absolute element of each such gradient."""
    update: list[float]
    """Largest absolute change of each tensor in the step."""
    weights: list[float]
    """Largest absolute element of each tensor after the step."""
    received: list[float] | None
    """L2 norms of the gradients that the optimizer received; None if they were not seen."""
    received_signed: list[float]
    """Their signed sums; empty if they were not seen, or belong to other tensors than `signed`."""
    mismatch: Mismatch | None
    """How far the gradients of two factors are from each other; None in a step without that look."""
    departure: Departure | None
    """How far the update is from the optimizer's own; None in a step without that look."""
    rates: updates.Rates | None
    """Learning rates of the tensors; None outside the Adam family."""
    dtypes: Sequence[torch.dtype]
    """Types of the parameters."""
    idle: list[str]
    """Tensors of layers that no token of the step passed through."""
    nonfinite_moments: Names
    """Optimizer states that are not finite."""
    direction: Direction | None = None
    """The direction of the first update; None in all other steps."""
    not_directed: str = ""
    """Why there is none; empty if there is, or if nothing has moved yet."""
    learning_rate: float | None
    """Learning rate of the first group."""
    seconds: float | None
    """Wall time of the step."""
    memory: int | None
    """Peak of the device allocator in bytes; None on a CPU."""


class Gathered:
    """Collects the numbers of steps of the tensors `names`.

    `weights` are their largest absolute elements before the first step, and `elements` the numbers of their elements.
    """

    def __init__(self, names: list[str], weights: list[float], elements: list[int]) -> None:
        self._names, self._weights, self._elements = names, weights, elements
        self._waiting: list[Numbers] = []
        self._records: list[StepRecord] = []
        self._first_norms: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._records) + len(self._waiting)

    def add(self, numbers: Numbers) -> None:
        """Add the numbers of the next step."""
        self._waiting.append(numbers)
        if len(self._waiting) >= _BATCHED_STEPS:
            self.records()

    def records(self) -> list[StepRecord]:
        """Records of the steps so far, without the rows and tokens of their micro-batches."""
        for numbers in self._waiting:
            self._records.append(self._record(numbers))
        self._waiting = []
        return self._records

    def first_norms(self) -> dict[str, float]:
        """L2 norm of each gradient in the first step with finite gradients only, by parameter."""
        self.records()
        return self._first_norms

    def _record(self, seen: Numbers) -> StepRecord:
        update, weights = ordered(seen.order, seen.update), ordered(seen.order, seen.weights)
        with_gradient, most = self._of_gradients(seen, seen.most)
        if not self._first_norms and finite(seen.norm):
            self._first_norms = dict(zip(*self._of_gradients(seen, seen.norm), strict=True))
        # nearly always, so that there is no check of each
        sound = finite(weights)
        usable = [True] * len(weights) if sound else [math.isfinite(w) for w in weights]
        ratio, furthest = updates.largest(seen.rates, seen.dtypes, self._names, update, self._weights, weights)
        self._weights = weights
        parting, mismatch, departure = self._parting(seen), seen.mismatch, seen.departure
        return StepRecord(
            step=len(self._records) + 1,
            micro_losses=tuple(seen.micro),
            model_losses=tuple(seen.own),
            offsets=tuple(seen.offsets),
            loss=_added_up(seen.loss),
            grad_norm=None if seen.gradient_order is None else _hypot(seen.norm),
            max_abs_gradient=None if seen.gradient_order is None else _largest(most),
            nonfinite_gradients=NONE if finite(most) else _named(with_gradient, most, lambda v: not math.isfinite(v)),
            missing_gradients=self._missing_gradients(seen),
            zero_gradients=_zeros(with_gradient, most),
            learning_rate=seen.learning_rate,
            loss_scale=seen.scale[0] if seen.scale else None,
            loss_scale_after=seen.scale_after[0] if seen.scale_after else None,
            changed=sum(f and u > 0 for f, u in zip(usable, update, strict=True)),
            unchanged=_zeros(self._names, update),
            gradients_cleared=seen.cleared,
            stale_gradients=_named(seen.stale_names, seen.stale, lambda v: v != 0),
            max_change_before=_largest(seen.moved) if seen.moved else None,
            idle=Names.of(seen.idle),
            nonfinite_weights=NONE if sound else _named(self._names, weights, lambda v: not math.isfinite(v)),
            nonfinite_moments=seen.nonfinite_moments,
            max_update=_largest(update),
            max_update_ratio=ratio,
            max_update_tensor=furthest,
            update_cosine=seen.direction.cosine if seen.direction else None,
            uphill_cosine=seen.direction.tensor_cosine if seen.direction else None,
            uphill_tensor=seen.direction.tensor if seen.direction else "",
            update_uncompared=seen.not_directed,
            received_grad_norm=None if seen.received is None else _hypot(seen.received),
            parting=None if parting is None else parting.share,
            parting_tensor="" if parting is None else parting.tensor,
            factor_mismatch=None if mismatch is None else mismatch.share,
            factor_layer="" if mismatch is None else mismatch.layer,
            factors_bounded=mismatch is not None and mismatch.bounded,
            departure=None if departure is None else departure.share,
            departure_tensor="" if departure is None else self._names[departure.place],
            seconds=seen.seconds,
            peak_memory_bytes=seen.memory,
        )

    def _parting(self, seen: Numbers) -> received.Parting | None:
        """What happened to the gradients of single tensors between the backward pass and the optimizer."""
        if not seen.received or not seen.received_signed or seen.gradient_order is None:
            return None
        every = (seen.norm, seen.signed, seen.received, seen.received_signed)
        names = [self._names[i] for i in seen.places]
        norm, signed, given, given_signed = (self._of_gradients(seen, n)[1] for n in every)
        left, there = (list(zip(*pair, strict=True)) for pair in ((norm, signed), (given, given_signed)))
        dtypes, elements = [seen.dtypes[i] for i in seen.places], [self._elements[i] for i in seen.places]
        return received.parting(names, dtypes, elements, left, there)

    def _of_gradients(self, seen: Numbers, numbers: list[float]) -> tuple[list[str], list[float]]:
        """Names of the parameters with a gradient, and the number of each from `numbers`, in the same order."""
        if seen.gradient_order is None:
            return [], []
        placed = ordered(seen.gradient_order, numbers)
        if len(placed) != len(seen.places):
            placed = [placed[i] for i in seen.places]
        return [self._names[i] for i in seen.places], placed

    def _missing_gradients(self, seen: Numbers) -> Names:
        if seen.gradient_order is None or len(seen.places) == len(self._names):
            return NONE
        there = set(seen.places)
        return Names.of(n for i, n in enumerate(self._names) if i not in there)


def finite(values: list[float]) -> bool:
    """Whether the sum of `values` is finite, and so all of them; if it overflows, check each."""
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
    """The largest value, or NaN if there is one; with `max`, that would depend on its position."""
    return math.nan if _has_nan(values) else max(values, default=0.0)


def _hypot(values: list[float]) -> float:
    return math.nan if _has_nan(values) else math.hypot(*values)


def _has_nan(values: list[float]) -> bool:
    return not finite(values) and any(map(math.isnan, values))
