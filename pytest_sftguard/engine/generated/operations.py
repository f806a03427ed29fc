"""Operations: what a generated fault does to one tensor, as a function of the tensor and of nothing global.

Random choices come from a generator of the fault's own, so that the training's generators stay as they are, and the
same entries are chosen each time.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from torch import Tensor

from pytest_sftguard.engine.generated.grammar import OPERATIONS, Draw, factor, places

IGNORED = -100
"""The label of a token that the loss leaves out."""


def generator(draw: Draw, *where: Any) -> torch.Generator:
    """A generator for `draw` at a place, the same in every process."""
    digest = hashlib.sha256(repr((draw.seed, draw.number, *where)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:6], "big"))


def on_numbers(draw: Draw, value: Tensor, name: str, step: int, past: Tensor | None = None) -> Tensor:
    """`value`, the numbers that pass in `step` for the tensor or module `name`, after the operation of `draw`.

    `past` is the earlier value that a stale or frozen one is taken from; without it the value stays. Differentiable.
    """
    size = draw.magnitude
    if draw.what == "scale":
        return value * factor(size, draw.choice)
    if draw.what == "shift":
        return value + size * _rms(value)
    if draw.what == "noise":
        noise = torch.randn(value.shape, generator=generator(draw, name, step)).to(value)
        return value + size * _rms(value) * noise
    if draw.what == "cast":
        return value + (_rounded(value.detach(), size) - value).detach()
    if past is None and OPERATIONS[draw.what].needs_past:
        return value
    other = _other(draw, value, past, name)
    if value.dim() == 0 or value.numel() == 1:
        return other if draw.what == "non-finite" else torch.lerp(value, other.to(value), size)
    # both places of an exchange have changed
    return other if draw.what == "swap" else torch.where(chosen(draw, value, name), other, value)


def chosen(draw: Draw, value: Tensor, name: str) -> Tensor:
    """Which entries of `value` are changed, at least one; the same ones in every step."""
    count = min(value.numel(), max(1, round(draw.magnitude * value.numel())))
    order = torch.randperm(value.numel(), generator=generator(draw, name, "entries"))
    mask = torch.zeros(value.numel(), dtype=torch.bool)
    mask[order[:count]] = True
    return mask.view(value.shape).to(value.device)


def _other(draw: Draw, value: Tensor, past: Tensor | None, name: str) -> Tensor:
    """What the changed entries become."""
    if past is not None:
        return past.to(value)
    if draw.what == "drop":
        return torch.zeros_like(value)
    if draw.what == "sign":
        return -value
    if draw.what == "non-finite":
        return torch.full_like(value, math.nan)
    if draw.what == "repeat":
        return value.flatten().roll(1).view(value.shape)
    assert draw.what == "swap", draw.what
    return _exchanged(draw, value, name)


def _exchanged(draw: Draw, value: Tensor, name: str) -> Tensor:
    """`value` with its chosen entries in another order: each one takes the place of the next."""
    moved = chosen(draw, value, name).flatten().nonzero().flatten()
    if len(moved) == 1:
        moved = torch.tensor([int(moved), (int(moved) + 1) % value.numel()], device=value.device)
    flat = value.flatten()
    order = torch.arange(value.numel(), device=value.device)
    order[moved] = order[moved].roll(1)
    return flat[order].view(value.shape)


def _rms(value: Tensor) -> Tensor:
    rms = value.detach().float().square().mean().sqrt()
    return torch.where(rms.isfinite(), rms, 0).to(value.dtype)


def _rounded(value: Tensor, precision: float) -> Tensor:
    """`value` with a mantissa of so many bits that its relative precision is `precision`, at least one bit."""
    mantissa, exponent = torch.frexp(value.float())
    levels = 2.0 ** max(1, round(-math.log2(precision)))
    return torch.ldexp((mantissa * levels).round() / levels, exponent).to(value.dtype)


def on_ids(draw: Draw, value: Tensor, eligible: Tensor, fill: int, step: int, past: Tensor | None = None) -> Tensor:
    """`value`, ids or a mask of shape (rows, tokens), after the operation of `draw`.

    `eligible` says which entries may change, and `fill` what a dropped one becomes. With `whom` of one row, only that
    row changes. `past` is the batch of an earlier step.
    """
    rows = torch.ones(len(value), 1, dtype=torch.bool)
    if draw.whom == "row":
        rows[:] = False
        rows[min(len(value) - 1, int(draw.choice * len(value)))] = True
    if draw.what == "shift":
        # it goes in at the front what went out at the end
        return torch.where(rows, value.roll(places(draw.magnitude), 1), value)
    share = torch.rand(value.shape, generator=generator(draw, step))
    share = torch.where(eligible & rows, share, math.inf)
    count = max(1, round(draw.magnitude * int((eligible & rows).sum())))
    mask = torch.zeros(value.numel(), dtype=torch.bool)
    mask[share.flatten().argsort()[:count]] = True
    mask = mask.view(value.shape) & eligible & rows
    return torch.where(mask, _other_ids(draw, value, eligible, fill, step, past), value)


def _other_ids(draw: Draw, value: Tensor, eligible: Tensor, fill: int, step: int, past: Tensor | None) -> Tensor:
    if draw.what == "drop":
        return torch.full_like(value, fill)
    if draw.what == "repeat":
        return value.roll(1, 1)
    if draw.what == "swap":
        # with the entry of the next row, or of the next token where there is only one row
        return value.roll(-1, 0 if len(value) > 1 else 1)
    if draw.what == "sign":
        return 1 - value
    if draw.what == "random":
        known = value[eligible] if draw.where != "mask" else torch.tensor([0, 1])
        if not len(known):
            return value
        return known[torch.randint(len(known), value.shape, generator=generator(draw, step, "ids"))].to(value)
    assert draw.what in ("stale", "freeze"), draw.what
    return value if past is None else _fitted(past, value)


def _fitted(past: Tensor, value: Tensor) -> Tensor:
    """An earlier batch in the shape of this one, where it is smaller with this one's own entries."""
    fitted = value.clone()
    rows, tokens = min(len(past), len(value)), min(past.shape[1], value.shape[1])
    fitted[:rows, :tokens] = past[:rows, :tokens]
    return fitted
