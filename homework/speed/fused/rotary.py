"""Rotary embeddings with fewer passes over queries and keys: a product, and two halves added to it in place.

transformers' models call a function `apply_rotary_pos_emb` of their own module; most are copies of one. During the
forward passes of the training it is replaced, where a trial shows that the fused path gives the same.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_NAME = "apply_rotary_pos_emb"
_Rotary = Callable[..., tuple[Tensor, Tensor]]


class _Rotate(torch.autograd.Function):
    """`x * cos + rotate_half(x) * sin`; shapes (..., tokens, size); `cos` and `sin` broadcast to it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.dtype = x.dtype
        half = x.shape[-1] // 2
        rotated_x = x * cos
        rotated_x[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
        rotated_x[..., half:].addcmul_(x[..., :half], sin[..., half:])
        return rotated_x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        half = gradient.shape[-1] // 2
        back = gradient * cos
        back[..., :half].addcmul_(gradient[..., half:], sin[..., half:])
        back[..., half:].addcmul_(gradient[..., :half], sin[..., :half], value=-1)
        return back.to(ctx.dtype), None, None


def rotaries(model: nn.Module) -> list[tuple[ModuleType, Any]]:
    """Return the modules whose rotary function the layers of `model` call, each with its replacement."""
    homes = {type(m).__module__: sys.modules.get(type(m).__module__) for m in model.modules()}
    found = [(home, vars(home).get(_NAME)) for home in homes.values() if home is not None]
    return [(home, _with_fused_path(plain)) for home, plain in found if callable(plain) and _is_common(plain)]


@contextlib.contextmanager
def rotated(places: list[tuple[ModuleType, Any]]) -> Iterator[None]:
    """Let forward passes take the fused path, unless somebody else has replaced the function."""
    mine = [(home, fused) for home, fused in places if getattr(home, _NAME) is fused.__wrapped__]
    for home, fused in mine:
        setattr(home, _NAME, fused)
    try:
        yield
    finally:
        for home, fused in mine:
            if getattr(home, _NAME) is fused:
                setattr(home, _NAME, fused.__wrapped__)


def _with_fused_path(plain: _Rotary) -> Any:
    """Return `plain` with the fused path before it."""

    @functools.wraps(plain)
    def apply(*given: Any, **named: Any) -> tuple[Tensor, Tensor]:
        if named or len(given) != 4 or not _fits(*given):
            return plain(*given, **named)
        q, k, cos, sin = given
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return _Rotate.apply(q, cos, sin), _Rotate.apply(k, cos, sin)  # type: ignore[no-untyped-call]

    return apply


def _fits(q: Any, k: Any, cos: Any, sin: Any) -> bool:
    """Return whether whole heads are rotated, by angles that need no gradient."""
    if not all(isinstance(t, Tensor) for t in (q, k, cos, sin)) or cos.dim() != 3:
        return False
    alike = cos.shape == sin.shape and cos.dtype == sin.dtype and not (cos.requires_grad or sin.requires_grad)
    return alike and all(
        x.dim() == 4 and x.shape[-2:] == cos.shape[-2:] and cos.shape[0] in (1, x.shape[0]) and x.shape[-1] % 2 == 0
        for x in (q, k)
    )


@functools.cache
def _is_common(plain: _Rotary) -> bool:
    """Return whether a trial shows that a function rotates the first half of each head against the second, as most do.

    The angles have a wider dtype than the heads: some functions return the dtype of the heads, and others the wider.
    """
    values = torch.linspace(-1, 2, 192, dtype=torch.float64)
    q, k = values[:144].view(2, 3, 3, 8).float(), values[144:].view(2, 1, 3, 8).float()
    cos, sin = values[9:57].view(2, 3, 8).square(), values[20:68].view(2, 3, 8)
    try:
        pairs = zip(plain(q, k, cos, sin), _with_fused_path(plain)(q, k, cos, sin), strict=True)
        return all(a.dtype == b.dtype and torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in pairs)
    # a function that refuses these arguments is another one
    except Exception:
        return False
