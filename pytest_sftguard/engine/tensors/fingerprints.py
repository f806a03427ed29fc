"""Fingerprints of rows: one number for a set of rows, whatever their order, padding and batch split."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pytest_sftguard.engine.tensors.reductions import GOLDEN_RATIO

_BITS = 48
"""A double holds as many exactly, so that the number leaves the device with the other numbers of a step."""
_MASK = (1 << _BITS) - 1
_BATCHED_TOKENS = 1 << 18
"""Tokens, with their padding, that are computed together: about twenty megabytes."""
_CONTENTS = ("pixel_values", "input_features", "input_values")
_PLACES = 4096
"""Places of a picture whose position counts in its fingerprint."""
_FILLS = {"input_ids": 0, "attention_mask": 0, "labels": -100}
"""Values of padding, which do not change a fingerprint."""


def fingerprint(inputs: Any, padding: int | None = None) -> Tensor | None:
    """Fingerprint of the rows of a batch, a scalar of 48 bits on its device; None if the batch has no token ids.

    It depends on the ids and labels of each row and on their positions among the tokens that are not padding. Those are
    the tokens of the `attention_mask`, or without one all tokens except `padding`.
    """
    rows = row_fingerprints(inputs, padding)
    return None if rows is None else rows.sum() & _MASK


def row_fingerprints(inputs: Any, padding: int | None = None) -> Tensor | None:
    """Fingerprint of each row of a batch, 48 bits, shape (rows,), on its device; None if the batch has no token ids."""
    rows = _row_numbers(inputs, padding)
    return None if rows is None else torch.as_tensor(rows)


def fingerprints(batches: Sequence[Any], padding: int | None = None) -> list[Tensor | None]:
    """The row fingerprints of each of `batches`; plain batches are computed together."""
    found: dict[int, Tensor | None] = {}
    for group in _groups(batches):
        rows, start = _row_numbers(_concatenated([batches[i] for i in group], padding), padding), 0
        for i in group:
            end = start + len(batches[i]["input_ids"])
            found[i] = torch.as_tensor(rows[start:end])
            start = end
    return [found[i] if i in found else row_fingerprints(inputs, padding) for i, inputs in enumerate(batches)]


def content_fingerprints(inputs: Any) -> Tensor | None:
    """Fingerprint of each row of a batch of pictures or sounds, shape (rows,), on its device; None if it has none.

    It is of all bits of the row, whose sum is computed at the speed of the memory, and of a few thousand places.
    """
    values = next((t for name in _CONTENTS if (t := _tensor(inputs, name)) is not None), None)
    if values is None or values.dim() < 2 or not values.numel() or not values.is_floating_point():
        return None
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    bits = values.detach().reshape(len(values), -1).view(integers)
    spread = bits[:, :: -(-bits.shape[1] // _PLACES)].to(torch.int64)
    weights = torch.as_tensor(_weights(spread.shape[1], bits.device))
    return torch.as_tensor(_scrambled((spread * weights).sum(1) + bits.sum(1, dtype=torch.int64)) & _MASK)


def added(fingerprints: Iterable[int]) -> int:
    """The fingerprint of a batch from those of its rows."""
    return sum(fingerprints) & _MASK


def _groups(batches: Sequence[Any]) -> Iterator[list[int]]:
    """Indices of plain batches, in groups that are not too large together."""
    group: list[int] = []
    rows = longest = 0
    for i, inputs in enumerate(batches):
        if not _is_plain(inputs, batches[0]):
            continue
        more, length = inputs["input_ids"].shape
        if group and (rows + more) * max(longest, length) > _BATCHED_TOKENS:
            yield group
            group, rows, longest = [], 0, 0
        group.append(i)
        rows, longest = rows + more, max(longest, length)
    if group:
        yield group


def supervised(inputs: Any) -> Tensor | None:
    """Number of labels that count in a batch: not those at the first position of a sequence, which nothing predicts."""
    labels = _tensor(inputs, "labels")
    if labels is None or not labels.dim():
        return None
    counted = _int64(labels) != -100
    # one label for each row is no sequence
    return torch.as_tensor((counted[..., 1:] if labels.dim() > 1 else counted).sum())


def _row_numbers(inputs: Any, padding: int | None) -> Any:
    """A number of 48 bits for each row of a batch; None if the batch has no token ids."""
    ids = _tensor(inputs, "input_ids")
    if ids is None or ids.dim() != 2 or ids.is_floating_point():
        return None
    labels = _tensor(inputs, "labels")
    words, there = _int64(ids) + 1, _int64(_mask(inputs, padding)) != 0
    weights = _weights(ids.shape[1] + 1, ids.device)[there.cumsum(1)]
    rows = 0
    if labels is not None and labels.shape[:1] == ids.shape[:1]:
        values = _int64(labels.float().view(torch.int32) if labels.is_floating_point() else labels)
        counted = values != -100
        marks = (values + 101) * counted
        if marks.shape == words.shape:
            words, there = words + (marks << 32), there | counted
        else:
            marks = marks.reshape(len(marks), -1)
            rows = _scrambled((marks * _weights(marks.shape[1], ids.device)).sum(1))
    return _scrambled(rows + (words * weights * there).sum(1)) & _MASK


def _mask(inputs: Any, padding: int | None) -> Tensor:
    """Mask of the tokens that are not padding."""
    ids, mask = inputs["input_ids"], _tensor(inputs, "attention_mask")
    if mask is not None and mask.shape == ids.shape:
        return mask
    return torch.ones_like(ids) if padding is None else ids != padding


def _is_plain(inputs: Any, first: Any) -> bool:
    """Whether a batch consists of token ids with a label for each, on the device of the `first` batch."""
    ids, labels = _tensor(inputs, "input_ids"), _tensor(inputs, "labels")
    if ids is None or labels is None or ids.dim() != 2 or ids.shape != labels.shape:
        return False
    integers = not ids.is_floating_point() and not labels.is_floating_point()
    other = _tensor(first, "input_ids")
    return integers and other is not None and ids.device == labels.device == other.device


def _concatenated(batches: Sequence[Any], padding: int | None) -> dict[str, Tensor]:
    """All rows of plain batches as one batch, padded on the right."""
    sizes = [inputs["input_ids"].shape for inputs in batches]
    shape, device = (sum(n for n, _ in sizes), max(length for _, length in sizes)), batches[0]["input_ids"].device
    batch = {name: torch.full(shape, fill, device=device) for name, fill in _FILLS.items()}
    into, start = {name: _int64(tensor) for name, tensor in batch.items()}, 0
    for inputs, (rows, length) in zip(batches, sizes, strict=True):
        given = {**inputs, "attention_mask": _mask(inputs, padding)}
        for name, numbers in into.items():
            numbers[start : start + rows, :length] = _int64(given[name])
        start += rows
    return batch


def joined(fingerprints: Iterable[float]) -> str:
    """One text for the fingerprints of all batches of a step."""
    return f"{sum(map(int, fingerprints)) & _MASK:012x}"


def joined_texts(texts: Iterable[str | None]) -> str | None:
    """One text for the texts of several parts of a step; None if one is missing."""
    parts = list(texts)
    return joined(int(t, 16) for t in parts if t) if parts and all(parts) else None


def _int64(tensor: Tensor) -> Any:
    """The tensor as 64-bit integers; on a CPU in numpy, whose calls on so few numbers take a quarter of torch's."""
    wide = tensor if tensor.dtype is torch.int64 else tensor.detach().to(torch.int64)
    return wide.numpy() if wide.device.type == "cpu" else wide


def _weights(places: int, device: torch.device) -> Any:
    """An odd factor for each position: two rows have the same weighted sum with a probability of 2**-63."""
    return _table(places.bit_length(), device)[:places]


@functools.lru_cache(maxsize=64)
def _table(bits: int, device: torch.device) -> Any:
    return _scrambled(_int64(torch.arange(1, 1 + (1 << bits), device=device))) | 1


def _scrambled(numbers: Any) -> Any:
    """Spread 64-bit integers, with wrapping: neighbours end far apart, and their sums do not cancel."""
    for shift in (31, 29, 32):
        numbers = (numbers ^ (numbers >> shift)) * GOLDEN_RATIO
    return numbers ^ (numbers >> 32)


def _tensor(inputs: Any, key: str) -> Tensor | None:
    value = inputs.get(key) if hasattr(inputs, "get") else None
    return value if isinstance(value, Tensor) else None
