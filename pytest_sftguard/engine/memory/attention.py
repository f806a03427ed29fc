"""Attention as a CUDA device computes it: with a fused kernel, or with plain products and a softmax.

Plain attention stores a number for each head and pair of tokens, and fused attention does not, so that a rehearsal on
the CPU must choose between them as the device does. The rules are those of torch's sdp_utils.cpp (in
aten/src/ATen/native/transformers/cuda) up to torch 2.13. Flash attention requires half precision, no mask and compute
capability 8.0, and supports grouped heads. The memory-efficient kernel also supports float32 and masks, but no grouped
heads, so that grouped heads in float32 are computed plainly. cuDNN's kernel, which some devices prefer, stores as much
as flash attention.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pytest_sftguard.hardware import AMPERE

_HALVES = (torch.float16, torch.bfloat16)
_FLASH_HEAD = 256
_ALIGNED_BYTES = 16


def fused(
    query: Tensor, value: Tensor, *, dtype: torch.dtype, masked: bool, grouped: bool, capability: tuple[int, int]
) -> bool:
    """Whether a device with this compute capability has a fused kernel for attention in `dtype`."""
    heads = (query.shape[-1], value.shape[-1])
    if dtype not in (*_HALVES, torch.float32) or query.dim() != 4:
        return False
    modern = capability >= AMPERE
    if modern and dtype in _HALVES and not masked and heads[0] == heads[1] and heads[0] <= _FLASH_HEAD:
        return True
    if grouped or (dtype is torch.bfloat16 and not modern):
        return False
    if dtype is torch.float32 and not modern:
        return True
    return all(head * dtype.itemsize % _ALIGNED_BYTES == 0 for head in heads)


@contextlib.contextmanager
def as_on_cuda(capability: tuple[int, int]) -> Iterator[None]:
    """Compute attention on the CPU plainly whenever a device of `capability` would.

    The function itself is replaced, because no TorchFunctionMode is active when a backward pass recomputes a layer.
    """
    functional: Any = torch.nn.functional
    original = functional.scaled_dot_product_attention

    @functools.wraps(original)
    def wrapped(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        masked, grouped, dtype = attn_mask is not None, query.shape[-3] != key.shape[-3], _compute_dtype(query)
        kernel = fused(query, value, dtype=dtype, masked=masked, grouped=grouped, capability=capability)
        # without `enable_gqa` grouped heads are broadcast, which no fused kernel supports
        broadcast = grouped and not kwargs.get("enable_gqa")
        with contextlib.nullcontext() if kernel and not broadcast else sdpa_kernel(SDPBackend.MATH):
            out: Tensor = original(query, key, value, attn_mask, *args, **kwargs)
            return out

    functional.scaled_dot_product_attention = wrapped
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = original


def _compute_dtype(query: Tensor) -> torch.dtype:
    """The type in which attention is computed, with autocast."""
    device_type = query.device.type
    if torch.is_autocast_enabled(device_type) and query.dtype is torch.float32:
        return torch.get_autocast_dtype(device_type)
    return query.dtype
