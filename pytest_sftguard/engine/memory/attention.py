"""Attention as a CUDA device computes it: whether a fused kernel takes it, or the plain products and a softmax.

The plain way keeps what the fused ones never hold, a number for each pair of tokens and head, so that a rehearsal on
the CPU must take it where the device would. The rules are those of torch's sdp_utils.cpp (in
aten/src/ATen/native/transformers/cuda): flash attention wants half precision, no mask and compute capability 8.0, and
knows grouped heads; the memory-efficient kernel takes float32 and masks too, and knows none. So grouped heads in
float32 are computed plainly. That is so up to torch 2.13; cuDNN's kernel, which some devices prefer, keeps as much as
flash attention does.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
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
    query: Tensor,
    value: Tensor,
    *,
    dtype: torch.dtype,
    masked: bool,
    grouped: bool,
    capability: tuple[int, int],
) -> bool:
    """Whether a fused kernel of a device of that compute capability takes the attention, computed in `dtype`."""
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
    """Compute attention on the CPU plainly wherever a device of `capability` would do so.

    The function is exchanged, as a TorchFunctionMode is not there while a backward pass computes a layer anew.
    """
    functional: Any = torch.nn.functional
    original = functional.scaled_dot_product_attention

    @functools.wraps(original)
    def attention(*args: Any, **kwargs: Any) -> Tensor:
        with contextlib.nullcontext() if _fused(args, kwargs, capability) else sdpa_kernel(SDPBackend.MATH):
            out: Tensor = original(*args, **kwargs)
            return out

    functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = original


def _fused(args: Any, kwargs: Any, capability: tuple[int, int]) -> bool:
    given = _SIGNATURE.bind(*args, **kwargs).arguments
    query, key, value = given["query"], given["key"], given["value"]
    kind, dtype = query.device.type, query.dtype
    if torch.is_autocast_enabled(kind) and dtype is torch.float32:
        dtype = torch.get_autocast_dtype(kind)
    grouped = query.shape[-3] != key.shape[-3]
    if grouped and not given.get("enable_gqa"):
        return False  # broadcast, which no fused kernel does
    masked = given.get("attn_mask") is not None
    return fused(query, value, dtype=dtype, masked=masked, grouped=grouped, capability=capability)


def _signature(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> None:
    """How attention is called; the builtin does not tell."""


_SIGNATURE = inspect.signature(_signature)
