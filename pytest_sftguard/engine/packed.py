"""Many small tensors side by side: one kernel looks at all that are equally long, where there would be one for each."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

_Key = TypeVar("_Key")


class Packed:
    """Copies of `tensors` in flat buffers, one for each type and device, with those of equal length side by side.

    On a CPU the seventy factors of a small adapter cost seventy calls of several microseconds for every number that is
    asked of each; here they cost two. What is asked of each comes in the order of the buffers: `ordered` undoes it.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._buffers: list[Tensor] = []
        self._rows: list[Tensor] = []
        self._stacks: list[tuple[list[int], Tensor]] = []
        self._order: list[int] = []
        views: dict[int, Tensor] = {}
        kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for i, tensor in enumerate(tensors):
            kinds.setdefault((tensor.dtype, tensor.device), []).append(i)
        lengths, shapes = [t.numel() for t in tensors], [tuple(t.shape) for t in tensors]
        for (dtype, device), members in kinds.items():
            members.sort(key=lambda i: (lengths[i], shapes[i]))
            buffer = torch.zeros(sum(lengths[i] for i in members), dtype=dtype, device=device)
            self._buffers.append(buffer)
            self._order += members
            start = 0
            for length, same in _grouped(members, lengths):
                rows = buffer[start : start + length * len(same)].view(len(same), length)
                self._rows.append(rows)
                start += rows.numel()
                first = 0
                for shape, alike in _grouped(same, shapes):
                    stack = rows[first : first + len(alike)].view(len(alike), *shape)
                    self._stacks.append((alike, stack))
                    views |= zip(alike, stack, strict=True)
                    first += len(alike)
        self.views = [views[i] for i in range(len(tensors))]
        """The copies, in the order and shapes of the tensors."""
        self.fill(tensors)

    @torch.no_grad()
    def fill(self, tensors: Sequence[Tensor], places: Sequence[int] | None = None) -> None:
        """Copy `tensors` in: to every place, or to `places` and zeros to the others."""
        if places is None or len(places) == len(self.views):
            for members, stack in self._stacks:
                torch.stack([tensors[i] for i in members], out=stack)
            return
        self.clear()
        for place, tensor in zip(places, tensors, strict=True):
            self.views[place].copy_(tensor)

    def clear(self) -> None:
        """Every element becomes zero."""
        for buffer in self._buffers:
            buffer.zero_()

    def takes(self, tensors: Sequence[Tensor], places: Sequence[int]) -> bool:
        """Whether `tensors` are of the types and shapes of `places`, so that copying changes nothing."""
        views = self.views
        if [t.dtype for t in tensors] != [views[i].dtype for i in places]:
            return False
        return all(t.shape == views[i].shape for t, i in zip(tensors, places, strict=True))

    def subtract(self, other: Packed) -> None:
        """Take the elements of `other` away from these."""
        for mine, theirs in zip(self._buffers, other._buffers, strict=True):
            torch.sub(mine, theirs, out=mine)

    def raise_to(self, other: Packed) -> None:
        """Each element becomes the larger one of its own and that of `other` without its sign, NaN where either is."""
        for mine, theirs in zip(self._buffers, other._buffers, strict=True):
            torch.maximum(mine, theirs.abs(), out=mine)

    def least(self) -> Tensor:
        """The smallest element of each buffer, NaN where it holds one."""
        return torch.cat([torch.empty(0), *(b.amin().reshape(1) for b in self._buffers if b.numel())])

    def largest(self) -> Tensor:
        """Largest absolute element of each tensor, NaN where it holds one; float32, nothing is waited for."""
        return self._of_each_row(lambda rows: torch.maximum(rows.amax(1), rows.amin(1).neg()))

    def extremes(self) -> Tensor:
        """The largest element of each buffer and its smallest, negated, NaN where there is one."""
        found = [x for b in self._buffers if b.numel() for x in (b.amax(), b.amin().neg())]
        return torch.stack([x.to(found[0].device, torch.float32) for x in found]) if found else torch.empty(0)

    def l2(self) -> Tensor:
        """L2 norm of each tensor; half precision, whose squares overflow from 256 on, is widened first."""
        return self._of_each_row(
            lambda rows: torch.linalg.vector_norm(rows.double() if rows.dtype == torch.float64 else rows.float(), dim=1)
        )

    def sums(self) -> Tensor:
        """The sum of each buffer: finite only where all elements are, and but for an overflow always then."""
        if not self._buffers:
            return torch.empty(0)
        wide = [b.sum(dtype=torch.promote_types(b.dtype, torch.float32)) for b in self._buffers]
        return torch.stack([s.to(self._buffers[0].device, torch.float64) for s in wide])

    def ordered(self, numbers: Sequence[float]) -> list[float]:
        """One number for each tensor, from the order of the buffers in that of the tensors."""
        placed = [0.0] * len(self._order)
        for place, number in zip(self._order, numbers, strict=True):
            placed[place] = number
        return placed

    def _of_each_row(self, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        if not self._rows:
            return torch.empty(0)
        device = self._rows[0].device
        found = [reduce(rows) if rows.shape[1] else rows.new_zeros(rows.shape[0]) for rows in self._rows]
        return torch.cat([f.to(device, torch.float32) for f in found])


def _grouped(members: list[int], by: Sequence[_Key]) -> Iterator[tuple[_Key, list[int]]]:
    for key, group in itertools.groupby(members, key=by.__getitem__):
        yield key, list(group)
