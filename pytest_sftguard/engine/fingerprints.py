"""Telling rows apart: a number for a set of rows that knows neither their order, nor their padding, nor their cut."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_ODD = 0x9E3779B97F4A7C15 - (1 << 64)  # the golden ratio in 64 bits, as a signed number
_BITS = 48  # what a double holds exactly, so that the sum leaves the device beside the other numbers of a step
_MASK = (1 << _BITS) - 1


def fingerprint(inputs: Any, padding: int | None = None) -> Tensor | None:
    """A number of 48 bits for the rows of a batch, on its device; None where it has no token ids.

    The ids and labels of a row count with their places among the tokens that are no padding: those of the
    `attention_mask`, or else all but `padding`.
    """
    ids = _tensor(inputs, "input_ids")
    if ids is None or ids.dim() != 2 or ids.is_floating_point():
        return None
    mask, labels = _tensor(inputs, "attention_mask"), _tensor(inputs, "labels")
    if mask is None or mask.shape != ids.shape:
        mask = torch.ones_like(ids) if padding is None else ids != padding
    mask = mask != 0
    place = mask.to(torch.int64).cumsum(1)
    rows = (_mixed(ids.to(torch.int64) * 1_000_003 + place) * mask).sum(1)
    if labels is not None and labels.shape[:1] == ids.shape[:1]:
        values = labels.float().view(torch.int32) if labels.is_floating_point() else labels
        counted = values != -100
        where = place if values.shape == place.shape else torch.zeros_like(values, dtype=torch.int64)
        marks = _mixed(values.to(torch.int64) * 998_244_353 + where + 7) * counted
        rows = rows + marks.reshape(len(marks), -1).sum(1)
    return _mixed(rows).bitwise_and(_MASK).sum().bitwise_and(_MASK)


def joined(fingerprints: Iterable[float]) -> str:
    """What is written of the fingerprints of all batches of a step."""
    return f"{sum(map(int, fingerprints)) & _MASK:012x}"


def joined_texts(texts: Iterable[str | None]) -> str | None:
    """The same for what was written of several parts of a step; None where one is missing."""
    parts = list(texts)
    return joined(int(t, 16) for t in parts if t) if parts and all(parts) else None


def _mixed(numbers: Tensor) -> Tensor:
    """Spread 64-bit integers, wrapping: neighbours come out far apart, and sums of them do not cancel."""
    for shift in (31, 29, 32):
        numbers = (numbers ^ (numbers >> shift)) * _ODD
    return numbers ^ (numbers >> 32)


def _tensor(inputs: Any, key: str) -> Tensor | None:
    value = inputs.get(key) if hasattr(inputs, "get") else None
    return value if isinstance(value, Tensor) else None
