"""Reductions of many small tensors: those of equal length become the rows of a matrix, which one kernel reduces.

On a CPU each kernel call takes several microseconds, and a small adapter has seventy factors. Grouped into blocks, they
need a few calls for every number instead of seventy. Results come block by block; `ordered` puts them into the order of
the tensors.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

_Key = TypeVar("_Key")

_BLOCK_ELEMENTS = {"cpu": 1 << 16}
"""Largest block on a CPU: a quarter of a megabyte of float32, which stays in the cache."""
_BLOCK_ELEMENTS_ELSEWHERE = 1 << 23
_SIGNS = 1 << 16
"""Number of different signs; a row of 2**32 elements needs no more."""


@dataclass(frozen=True)
class _Block:
    """Tensors of one type, device and length, as the rows of a matrix."""

    rows: Tensor
    """The matrix, into which they are copied. Blocks of one type share their memory."""
    stacks: list[tuple[list[int], Tensor]]
    """Indices of the tensors of one shape, and their part of `rows`, in that shape."""


class Layout:
    """The order and grouping in which tensors like `tensors` are copied into blocks."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        types = [(t.dtype, t.device) for t in tensors]
        self._shapes = [t.shape for t in tensors]
        lengths, shapes = [t.numel() for t in tensors], [tuple(t.shape) for t in tensors]
        keys = [(str(type_), length) for type_, length in zip(types, lengths, strict=True)]
        parts: list[list[int]] = []
        for (_, length), alike in _grouped(sorted(range(len(tensors)), key=lambda i: (keys[i], shapes[i])), keys):
            elements = _BLOCK_ELEMENTS.get(tensors[alike[0]].device.type, _BLOCK_ELEMENTS_ELSEWHERE)
            rows = max(1, elements // max(1, length))
            parts += [alike[i : i + rows] for i in range(0, len(alike), rows)]
        sizes: dict[tuple[torch.dtype, torch.device], int] = {}
        for part in parts:
            type_ = types[part[0]]
            sizes[type_] = max(sizes.get(type_, 0), len(part) * lengths[part[0]])
        memory = {type_: torch.empty(size, dtype=type_[0], device=type_[1]) for type_, size in sizes.items()}
        self._blocks = [_block(part, memory[types[part[0]]], lengths[part[0]], shapes) for part in parts]
        self.order = [i for part in parts for i in part]
        """Indices of the tensors, in the order of the blocks' rows."""

    def blocks(self, tensors: Sequence[Tensor], places: Sequence[int] | None = None) -> Iterator[Tensor]:
        """Copies of `tensors`, block by block, shape (tensors, elements); each block overwrites the one before.

        If `places` are given, in ascending order, they are the indices of `tensors`, and all other rows are zero. Call
        it without gradients only.
        """
        complete = len(tensors) == len(self.order)
        there = {} if complete else dict(zip(places or (), tensors, strict=True))
        for block in self._blocks:
            for members, stack in block.stacks:
                if complete:
                    torch.stack([tensors[i] for i in members], out=stack)
                    continue
                stack.zero_()
                for i, row in zip(members, stack, strict=True):
                    if i in there:
                        row.copy_(there[i])
            yield block.rows

    def copies(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Lasting copies of `tensors`, one matrix for each block."""
        with torch.no_grad():
            return [rows.clone() for rows in self.blocks(tensors)]

    def tensors_of(self, copies: Sequence[Tensor]) -> list[Tensor]:
        """The tensors in `copies`, in their own order and shapes, as views."""
        rows = (row for matrix in copies for row in matrix)
        found = {i: row.view(self._shapes[i]) for i, row in zip(self.order, rows, strict=True)}
        return [found[i] for i in range(len(found))]


def ordered(order: Sequence[int], numbers: Sequence[float]) -> list[float]:
    """One number for each tensor, from the order of a layout's rows into that of the tensors."""
    placed = [0.0] * len(order)
    for place, number in zip(order, numbers, strict=True):
        placed[place] = number
    return placed


def largest(rows: Tensor) -> Tensor:
    """Largest absolute element of each row, or NaN if the row contains NaN; overwrites `rows` with their magnitudes."""
    return rows.abs_().amax(1) if rows.shape[1] else rows.new_zeros(rows.shape[0])


def l2(rows: Tensor) -> Tensor:
    """L2 norm of each row; half precision, whose squares overflow from 256 on, is widened first."""
    norm: Tensor = torch.linalg.vector_norm(rows if rows.dtype == torch.float64 else rows.float(), dim=1)
    return norm


def total(rows: Tensor) -> Tensor:
    """The sum of all elements, shape (1,): finite only if all of them are, and then always unless it overflows."""
    return rows.sum(dtype=torch.promote_types(rows.dtype, torch.float32)).reshape(1)


class Signs:
    """Fixed signs, drawn at random once, under which the elements of rows are added up.

    Such a sum changes with nearly every change of a row that leaves its norm: of an order, of a sign, of one element.
    """

    def __init__(self) -> None:
        self._drawn: dict[torch.device, Tensor] = {}

    def total(self, rows: Tensor) -> Tensor:
        """The sum of each row, shape (rows,)."""
        signs = self._drawn.get(rows.device)
        if signs is None:
            # a generator of its own leaves the training's as it is
            drawn = torch.randint(2, (_SIGNS,), generator=torch.Generator().manual_seed(0))
            signs = self._drawn[rows.device] = (2.0 * drawn - 1).to(rows.device)
        wide = rows if rows.dtype == torch.float64 else rows.float()
        signs = signs.to(wide.dtype)
        count, length = wide.shape
        if length <= _SIGNS:
            return torch.mv(wide, signs[:length])
        whole = length - length % _SIGNS
        # signs of signs, so that a long row needs no more of them
        parts = torch.matmul(wide[:, :whole].view(count, -1, _SIGNS), signs)
        sums: Tensor = torch.mv(parts, signs[: parts.shape[1]]) + torch.mv(wide[:, whole:], signs[: length - whole])
        return sums


def joined(parts: Sequence[Tensor]) -> Tensor:
    """All numbers of `parts` in one float32 tensor, on the device of the first."""
    if not parts:
        return torch.empty(0)
    return torch.cat([p.to(parts[0].device, torch.float32) for p in parts])


def _block(part: list[int], memory: Tensor, length: int, shapes: Sequence[tuple[int, ...]]) -> _Block:
    rows = memory[: len(part) * length].view(len(part), length)
    stacks: list[tuple[list[int], Tensor]] = []
    start = 0
    for shape, alike in _grouped(part, shapes):
        stacks.append((alike, rows[start : start + len(alike)].view(len(alike), *shape)))
        start += len(alike)
    return _Block(rows, stacks)


def _grouped(members: Iterable[int], by: Sequence[_Key]) -> Iterator[tuple[_Key, list[int]]]:
    for key, group in itertools.groupby(members, key=by.__getitem__):
        yield key, list(group)
