"""Many small tensors side by side: one kernel looks at all that are equally long, where there would be one for each.

On a CPU the seventy factors of a small adapter cost seventy calls of several microseconds for every number that is
asked of each; here they cost a few. What is asked comes row by row, block by block: `Layout.ordered` sorts it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

_Key = TypeVar("_Key")

_AT_ONCE = {"cpu": 1 << 16}
"""Elements that are looked at together: on a CPU a quarter of a megabyte of float32, which a cache holds meanwhile."""
_AT_ONCE_ELSEWHERE = 1 << 23


@dataclass(frozen=True)
class _Block:
    """Some tensors of one type on one device, all of one length: the rows of a matrix."""

    members: list[int]
    """Their places among all tensors."""
    rows: Tensor
    """Where they are copied to; blocks of one type share the memory."""
    stacks: list[tuple[list[int], Tensor]]
    """Those of one shape, and their part of `rows`, in that shape."""


class Layout:
    """How copies of tensors such as `tensors` lie side by side, to be looked at or to be kept."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        kinds = [(t.dtype, t.device) for t in tensors]
        self._shapes = [t.shape for t in tensors]
        lengths, shapes = [t.numel() for t in tensors], [tuple(t.shape) for t in tensors]
        keys = [(str(kind), length) for kind, length in zip(kinds, lengths, strict=True)]
        parts: list[list[int]] = []
        for (_, length), alike in _grouped(sorted(range(len(tensors)), key=lambda i: (keys[i], shapes[i])), keys):
            at_once = _AT_ONCE.get(tensors[alike[0]].device.type, _AT_ONCE_ELSEWHERE)
            rows = max(1, at_once // max(1, length))
            parts += [alike[i : i + rows] for i in range(0, len(alike), rows)]
        sizes: dict[tuple[torch.dtype, torch.device], int] = {}
        for part in parts:
            kind = kinds[part[0]]
            sizes[kind] = max(sizes.get(kind, 0), len(part) * lengths[part[0]])
        memory = {kind: torch.empty(size, dtype=kind[0], device=kind[1]) for kind, size in sizes.items()}
        self._blocks = [_block(part, memory[kinds[part[0]]], lengths, shapes) for part in parts]
        self.order = [i for part in parts for i in part]
        """Places of the tensors, in the order in which the blocks speak of them."""

    def laid(self, tensors: Sequence[Tensor], places: Sequence[int] | None = None) -> Iterator[Tensor]:
        """Copies of `tensors`, block by block, shape (tensors, elements); each is written over the one before.

        Where `places` are given, in ascending order, `tensors` are the ones at these, and all others are zero. Without
        gradients only.
        """
        whole = len(tensors) == len(self.order)
        there = {} if whole else dict(zip(places or (), tensors, strict=True))
        for block in self._blocks:
            for members, stack in block.stacks:
                if whole:
                    torch.stack([tensors[i] for i in members], out=stack)
                    continue
                stack.zero_()
                for i, row in zip(members, stack, strict=True):
                    if i in there:
                        row.copy_(there[i])
            yield block.rows

    def kept(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copies of `tensors` to keep, one matrix for each block."""
        with torch.no_grad():
            return [rows.clone() for rows in self.laid(tensors)]

    def unpacked(self, kept: Sequence[Tensor]) -> list[Tensor]:
        """The tensors of `kept`, in their own order and shapes, without a copy."""
        rows = (row for matrix in kept for row in matrix)
        found = {i: row.view(self._shapes[i]) for i, row in zip(self.order, rows, strict=True)}
        return [found[i] for i in range(len(found))]


def ordered(order: Sequence[int], numbers: Sequence[float]) -> list[float]:
    """One number for each tensor, from the order of a layout's blocks in that of the tensors."""
    placed = [0.0] * len(order)
    for place, number in zip(order, numbers, strict=True):
        placed[place] = number
    return placed


def largest(rows: Tensor) -> Tensor:
    """Largest absolute element of each row, NaN where it holds one; `rows` lose their signs."""
    return rows.abs_().amax(1) if rows.shape[1] else rows.new_zeros(rows.shape[0])


def l2(rows: Tensor) -> Tensor:
    """L2 norm of each row; half precision, whose squares overflow from 256 on, is widened first."""
    norm: Tensor = torch.linalg.vector_norm(rows if rows.dtype == torch.float64 else rows.float(), dim=1)
    return norm


def total(rows: Tensor) -> Tensor:
    """The sum of all elements: finite only where all of them are, and but for an overflow always then."""
    return rows.sum(dtype=torch.promote_types(rows.dtype, torch.float32)).reshape(1)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """All numbers of `parts` in one float32 tensor, where the first of them is."""
    if not parts:
        return torch.empty(0)
    return torch.cat([p.to(parts[0].device, torch.float32) for p in parts])


def _block(part: list[int], memory: Tensor, lengths: Sequence[int], shapes: Sequence[tuple[int, ...]]) -> _Block:
    length = lengths[part[0]]
    rows = memory[: len(part) * length].view(len(part), length)
    stacks: list[tuple[list[int], Tensor]] = []
    start = 0
    for shape, alike in _grouped(part, shapes):
        stacks.append((alike, rows[start : start + len(alike)].view(len(alike), *shape)))
        start += len(alike)
    return _Block(part, rows, stacks)


def _grouped(members: Iterable[int], by: Sequence[_Key]) -> Iterator[tuple[_Key, list[int]]]:
    for key, group in itertools.groupby(members, key=by.__getitem__):
        yield key, list(group)
