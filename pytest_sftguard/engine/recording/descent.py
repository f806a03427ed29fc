"""The direction of an update: its cosine with the gradient of the loss, over all tensors and for each of them.

An optimizer may scale, clip, precondition or take the sign of a gradient, and its update still goes downhill, against
the gradient. What turns an update around is an error of sign between the backward pass and the weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_NUMBERS = 7
"""Numbers of a tensor: three products, and the squared norms of two updates and of two gradients."""


@dataclass(frozen=True)
class Direction:
    """The cosines of an update, the change of the weights, with the gradient: -1 is straight downhill."""

    cosine: float
    """Over all tensors with a gradient."""
    tensor: str
    """The tensor with the largest cosine of its own."""
    tensor_cosine: float
    """That cosine."""


def momentum_of(optimizer: torch.optim.Optimizer) -> float | None:
    """Share of the gradient of the step before that an update holds, by the options of the groups, the largest one.

    None where none says so.
    """
    rates = [
        value[0] if isinstance(value, (tuple, list)) else value
        for group in optimizer.param_groups
        for name in ("momentum", "betas", "beta1")
        if (value := group.get(name, ())) != ()
    ]
    return max(map(_number, rates)) if rates else None


def momentum_carried(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer that has not stepped in this training has states of earlier steps."""
    for state in optimizer.state.values():
        steps = state.get("step") if isinstance(state, dict) else None
        # an optimizer may make its states, zeros, together with itself
        if state and (steps is None or float(steps) > 0):
            return True
    return False


def decays(optimizer: torch.optim.Optimizer, tensors: Sequence[Tensor]) -> list[tuple[float, float]]:
    """Learning rate and weight decay of each of `tensors`; zeros where its group has none of the two."""
    known = {}
    for group in optimizer.param_groups:
        rate, decay = (group.get(name) for name in ("lr", "weight_decay"))
        known.update(dict.fromkeys(map(id, group["params"]), (_number(rate), _number(decay))))
    return [known.get(id(t), (0.0, 0.0)) for t in tensors]


@torch.no_grad()
def products(
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    gradients: Sequence[Tensor],
    decays: Sequence[tuple[float, float]],
) -> Tensor:
    """The numbers of each tensor that `direction` needs, shape (tensors x 7,), on the device of the first.

    `gradients` are those of the loss, without a loss scale. Nothing waits for the device.
    """
    rows = []
    for old, new, gradient, (rate, decay) in zip(before, after, gradients, decays, strict=True):
        # squares of float32 updates underflow; mps has no float64
        wide = torch.float32 if old.device.type == "mps" else torch.float64
        w, g = old.to(wide).flatten(), gradient.to(old.device, wide).flatten()
        step = new.detach().to(wide).flatten() - w
        bare, pulled = step + rate * decay * w, g + decay * w
        pairs = ((step, g), (bare, g), (step, pulled), (step, step), (bare, bare), (g, g), (pulled, pulled))
        rows.append(torch.stack([torch.dot(a, b) for a, b in pairs]))
    return torch.cat([r.to(rows[0].device) for r in rows]) if rows else torch.empty(0)


def direction(names: Sequence[str], numbers: Sequence[float]) -> Direction | None:
    """The direction of the update from the `numbers` of `products`; None if no tensor with a gradient moved.

    Weight decay may be subtracted from the weights or added to the gradient. Of the three readings the one that goes
    downhill most counts, so that decay never makes a sound step look like one uphill.
    """
    rows = [numbers[i : i + _NUMBERS] for i in range(0, len(numbers), _NUMBERS)]
    every = _least([math.fsum(column) for column in zip(*rows, strict=True)]) if rows else None
    if every is None:
        return None
    own = [(name, c) for name, row in zip(names, rows, strict=True) if (c := _least(row)) is not None]
    # NaN is the worst
    name, largest = max(own, key=lambda named: math.inf if math.isnan(named[1]) else named[1])
    return Direction(every, name, largest)


def _least(row: Sequence[float]) -> float | None:
    """The smallest of the three cosines; NaN if a number is; None without a gradient or an update."""
    products, (steps, bare, gradients, pulled) = row[:3], row[3:]
    # a step that the loss scaler skipped moved nothing, and its gradients may be infinite
    if steps == 0:
        return None
    if not all(map(math.isfinite, row)):
        return math.nan
    squares = (steps * gradients, bare * gradients, steps * pulled)
    found = [product / math.sqrt(square) for product, square in zip(products, squares, strict=True) if square > 0]
    return min(found) if found and squares[0] > 0 else None


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) else 0.0
