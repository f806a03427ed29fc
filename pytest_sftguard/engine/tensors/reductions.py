"""Reductions of many tensors at once, with one transfer to the host, and digests that never round."""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

_CHUNK = 1 << 22
GOLDEN_RATIO = 0x9E3779B97F4A7C15 - (1 << 64)
"""The golden ratio in 64 bits, as a signed number; a product with it spreads neighbouring integers."""


def norms(tensors: Sequence[Tensor], order: float) -> Tensor:
    """L2 norm (`order` 2) or largest absolute element (`order` inf) of each tensor, float32, shape (len(tensors),).

    NaN in a tensor gives NaN, infinity gives infinity; nothing synchronises with the host. Half precision is widened
    first, because the squares of float16 overflow from 256 on.
    """
    if not tensors:
        return torch.empty(0)
    wide = [t if t.dtype in (torch.float32, torch.float64) else t.float() for t in tensors]
    # a model may be spread over several devices
    device = wide[0].device
    if order == math.inf and device.type == "cpu" and all(t.numel() for t in wide):
        # one fused kernel on CUDA; on a CPU its inf norm takes eight times as long as aminmax
        extremes = [torch.aminmax(t) for t in wide]
        least = torch.stack([e.min.to(device, torch.float32) for e in extremes])
        most = torch.stack([e.max.to(device, torch.float32) for e in extremes])
        return torch.maximum(-least, most)
    return torch.stack([n.to(device, torch.float32) for n in torch._foreach_norm(wide, order)])


def identical(some: Sequence[object], others: Sequence[object]) -> bool:
    """Whether two sequences contain the very same objects in the same order."""
    return len(some) == len(others) and all(map(operator.is_, some, others))


def dtype_name(dtype: torch.dtype) -> str:
    """Name of a type as in records: `float16` for `torch.float16`."""
    return str(dtype).removeprefix("torch.")


def to_host(parts: Sequence[Tensor]) -> list[list[float]]:
    """Each 1-d tensor as a list of Python floats, with one transfer for all."""
    if not parts:
        return []
    device = next((p.device for p in parts if p.numel()), torch.device("cpu"))
    there = [p if p.device == device else p.to(device) for p in parts if p.numel()]
    # the empty tensor makes float64 the type of all
    flat = torch.cat([torch.empty(0, dtype=torch.float64, device=device), *there]).tolist()
    lists, start = [], 0
    for p in parts:
        lists.append(flat[start : start + p.numel()])
        start += p.numel()
    return lists


def digests(named: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """Digest of the bits of each tensor, by name; the same on every device and for every number of threads.

    A digest is of two sums in wrapping 64-bit integers, one of them weighted by position, because integer sums do not
    depend on the order. One changed bit changes it; two changes cancel with a probability of about 2**-64.
    """
    names, sums = [], []
    for name, tensor in named:
        names.append(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}")
        sums.append(_sums(tensor.detach()).cpu())
    return {
        name.rpartition(":")[0].rpartition(":")[0]: hashlib.sha256(name.encode() + s.numpy().tobytes()).hexdigest()[:16]
        for name, s in zip(names, sums, strict=True)
    }


def combined(parts: dict[str, str]) -> str:
    """One digest of many, whatever their order."""
    return hashlib.sha256("\n".join(f"{n} {d}" for n, d in sorted(parts.items())).encode()).hexdigest()[:32]


def _sums(tensor: Tensor) -> Tensor:
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    bits = tensor.contiguous().reshape(-1).view(integers[tensor.element_size()])
    total = torch.zeros(2, dtype=torch.int64, device=bits.device)
    for start in range(0, bits.numel(), _CHUNK):
        part = bits[start : start + _CHUNK].to(torch.int64)
        place = torch.arange(start + 1, start + 1 + part.numel(), device=part.device)
        total[0] += part.sum()
        total[1] += (part * (place * GOLDEN_RATIO)).sum()
    return total
