"""Telling rows apart: a number for a set of rows that knows neither their order, nor their padding, nor their cut."""

from __future__ import annotations

import functools
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
    words, there = _whole(ids) + 1, _whole(mask) != 0
    weights = _weights(ids.shape[1] + 1, ids.device)[there.cumsum(1)]
    rows = 0
    if labels is not None and labels.shape[:1] == ids.shape[:1]:
        values = _whole(labels.float().view(torch.int32) if labels.is_floating_point() else labels)
        counted = values != -100
        marks = (values + 101) * counted
        if marks.shape == words.shape:
            words, there = words + (marks << 32), there | counted
        else:
            marks = marks.reshape(len(marks), -1)
            rows = _mixed((marks * _weights(marks.shape[1], ids.device)).sum(1))
    rows = rows + (words * weights * there).sum(1)
    return torch.as_tensor((_mixed(rows) & _MASK).sum() & _MASK)


def joined(fingerprints: Iterable[float]) -> str:
    """What is written of the fingerprints of all batches of a step."""
    return f"{sum(map(int, fingerprints)) & _MASK:012x}"


def joined_texts(texts: Iterable[str | None]) -> str | None:
    """The same for what was written of several parts of a step; None where one is missing."""
    parts = list(texts)
    return joined(int(t, 16) for t in parts if t) if parts and all(parts) else None


def _whole(tensor: Tensor) -> Any:
    """The tensor as 64-bit integers; on a CPU in numpy, whose calls on so few numbers take a quarter of torch's."""
    wide = tensor if tensor.dtype is torch.int64 else tensor.detach().to(torch.int64)
    return wide.numpy() if wide.device.type == "cpu" else wide


def _weights(places: int, device: torch.device) -> Any:
    """An odd factor for each place: sums of tokens times these tell all rows apart but for a chance of 2**-63."""
    return _table(places.bit_length(), device)[:places]


@functools.lru_cache(maxsize=64)
def _table(bits: int, device: torch.device) -> Any:
    return _mixed(_whole(torch.arange(1, 1 + (1 << bits), device=device))) | 1


def _mixed(numbers: Any) -> Any:
    """Spread 64-bit integers, wrapping: neighbours come out far apart, and sums of them do not cancel."""
    for shift in (31, 29, 32):
        numbers = (numbers ^ (numbers >> shift)) * _ODD
    return numbers ^ (numbers >> 32)


def _tensor(inputs: Any, key: str) -> Tensor | None:
    value = inputs.get(key) if hasattr(inputs, "get") else None
    return value if isinstance(value, Tensor) else None
