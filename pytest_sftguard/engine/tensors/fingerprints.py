"""Telling rows apart: a number for a set of rows that knows neither their order, nor their padding, nor their cut."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
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
    rows = _of_rows(inputs, padding)
    return None if rows is None else torch.as_tensor(rows.sum() & _MASK)


def fingerprints(batches: Sequence[Any], padding: int | None = None) -> list[Tensor | None]:
    """The fingerprint of each of `batches`; those of one kind are worked out together."""
    found: dict[int, Tensor | None] = {}
    for group in _groups(batches):
        rows, start = _of_rows(_side_by_side([batches[i] for i in group], padding), padding), 0
        for i in group:
            end = start + len(batches[i]["input_ids"])
            found[i] = torch.as_tensor(rows[start:end].sum() & _MASK)
            start = end
    return [found[i] if i in found else fingerprint(inputs, padding) for i, inputs in enumerate(batches)]


_TOGETHER = 1 << 18
"""Tokens that are worked out together, padding included: some twenty megabytes."""


def _groups(batches: Sequence[Any]) -> Iterator[list[int]]:
    """Places of batches that are plain, and not too large together."""
    group: list[int] = []
    rows = longest = 0
    for i, inputs in enumerate(batches):
        if not _is_plain(inputs, batches[0]):
            continue
        more, length = inputs["input_ids"].shape
        if group and (rows + more) * max(longest, length) > _TOGETHER:
            yield group
            group, rows, longest = [], 0, 0
        group.append(i)
        rows, longest = rows + more, max(longest, length)
    if group:
        yield group


def supervised(inputs: Any) -> Tensor | None:
    """How many labels of a batch are asked for: of all but the first place, which nothing predicts."""
    labels = _tensor(inputs, "labels")
    if labels is None or not labels.dim():
        return None
    return torch.as_tensor((_whole(labels)[..., 1:] != -100).sum())


def _of_rows(inputs: Any, padding: int | None) -> Any:
    """A number of 48 bits for each row of a batch; None where it has no token ids."""
    ids = _tensor(inputs, "input_ids")
    if ids is None or ids.dim() != 2 or ids.is_floating_point():
        return None
    labels = _tensor(inputs, "labels")
    words, there = _whole(ids) + 1, _whole(_mask(inputs, padding)) != 0
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
    return _mixed(rows + (words * weights * there).sum(1)) & _MASK


def _mask(inputs: Any, padding: int | None) -> Tensor:
    """Where the tokens are that are no padding."""
    ids, mask = inputs["input_ids"], _tensor(inputs, "attention_mask")
    if mask is not None and mask.shape == ids.shape:
        return mask
    return torch.ones_like(ids) if padding is None else ids != padding


def _is_plain(inputs: Any, first: Any) -> bool:
    """Whether a batch is nothing but token ids with a label for each, on the device of the `first` one."""
    ids, labels = _tensor(inputs, "input_ids"), _tensor(inputs, "labels")
    if ids is None or labels is None or ids.dim() != 2 or ids.shape != labels.shape:
        return False
    whole = not ids.is_floating_point() and not labels.is_floating_point()
    there = _tensor(first, "input_ids")
    return whole and there is not None and ids.device == labels.device == there.device


def _side_by_side(batches: Sequence[Any], padding: int | None) -> dict[str, Tensor]:
    """All rows of plain batches as one batch, padded on the right."""
    sizes = [inputs["input_ids"].shape for inputs in batches]
    shape, device = (sum(n for n, _ in sizes), max(length for _, length in sizes)), batches[0]["input_ids"].device
    joined = {name: torch.full(shape, fill, device=device) for name, fill in _FILLS.items()}
    into, start = {name: _whole(tensor) for name, tensor in joined.items()}, 0
    for inputs, (rows, length) in zip(batches, sizes, strict=True):
        given = {**inputs, "attention_mask": _mask(inputs, padding)}
        for name, numbers in into.items():
            numbers[start : start + rows, :length] = _whole(given[name])
        start += rows
    return joined


_FILLS = {"input_ids": 0, "attention_mask": 0, "labels": -100}
"""What padding is made of: it counts for nothing."""


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
