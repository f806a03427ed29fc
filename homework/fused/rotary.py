"""Rotary positions with fewer passes over queries and keys: a product, and two halves added to it in place.

transformers' models call a function of their own module by the name `apply_rotary_pos_emb`; most are copies of one. For
the forward passes of the training another one stands in its place, wherever that gives the same, tried out.
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
Places = list[tuple[ModuleType, _Rotary]]
"""Modules whose function can be replaced, and what is to stand there."""


class _Rotate(torch.autograd.Function):
    """`x * cos + rotate_half(x) * sin`; shapes (..., tokens, size), of `cos` and `sin` any that spread to it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.dtype = x.dtype
        half = x.shape[-1] // 2
        turned = x * cos
        turned[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
        turned[..., half:].addcmul_(x[..., :half], sin[..., half:])
        return turned

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        half = gradient.shape[-1] // 2
        back = gradient * cos
        back[..., :half].addcmul_(gradient[..., half:], sin[..., half:])
        back[..., half:].addcmul_(gradient[..., :half], sin[..., :half], value=-1)
        return back.to(ctx.dtype), None, None


def rotaries(model: nn.Module) -> Places:
    """Where the layers of `model` find a function that has a short way."""
    homes = {type(m).__module__: sys.modules.get(type(m).__module__) for m in model.modules()}
    found = [(home, vars(home).get(_NAME)) for home in homes.values() if home is not None]
    return [(home, _short(plain)) for home, plain in found if callable(plain) and _is_common(plain)]


@contextlib.contextmanager
def rotated(places: Places) -> Iterator[None]:
    """Forward passes take the short way."""
    before = [getattr(home, _NAME) for home, _ in places]
    for home, short in places:
        setattr(home, _NAME, short)
    try:
        yield
    finally:
        for (home, _), plain in zip(places, before, strict=True):
            setattr(home, _NAME, plain)


def _short(plain: _Rotary) -> _Rotary:
    """`plain`, with the short way before it."""

    @functools.wraps(plain)
    def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *more: Any, **named: Any) -> tuple[Tensor, Tensor]:
        if more or named or not all(_fits(x, cos, sin) for x in (q, k)):
            return plain(q, k, cos, sin, *more, **named)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return _Rotate.apply(q, cos, sin), _Rotate.apply(k, cos, sin)  # type: ignore[no-untyped-call]

    return apply


def _fits(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether the whole of each head is turned, by angles that nothing is learnt of."""
    alike = cos.shape == sin.shape and cos.dtype == sin.dtype and not (cos.requires_grad or sin.requires_grad)
    return alike and x.dim() == 4 and cos.dim() == 3 and x.shape[-2:] == cos.shape[-2:] and x.shape[-1] % 2 == 0


@functools.cache
def _is_common(plain: _Rotary) -> bool:
    """Whether a function turns the first half of each head against the second, as most do, tried out."""
    line = torch.linspace(-1, 2, 72, dtype=torch.float64)
    q, k, cos, sin = line[:48].view(1, 2, 3, 8), line[48:].view(1, 1, 3, 8), line[9:33][None], line[20:44][None]
    cos, sin = cos.view(1, 3, 8).square(), sin.view(1, 3, 8)
    try:
        theirs = plain(q, k, cos, sin)
        return all(torch.allclose(a, b, rtol=1e-9) for a, b in zip(theirs, _short(plain)(q, k, cos, sin), strict=True))
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):  # one that takes other arguments
        return False
