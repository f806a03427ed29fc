"""Attention over unpadded tokens, each within its row: the function that transformers calls by name."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface

from .rows import Heads, Rows

NAME = "homework_short_rows"
ROWS: ContextVar[Rows] = ContextVar("rows")
"""The layout of the current forward pass."""
_UNDERSTOOD = ("position_ids", "use_cache", "output_attentions", "is_causal", "cu_seq_lens_q", "cu_seq_lens_k")


class CannotPackError(NotImplementedError):
    """The model asks for more than plain causal attention."""


class _Attend(torch.autograd.Function):
    """Attention within rows. Autograd's own graph of it spends more time on copies than on products."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, heads: Heads, scaling: float, dropout: float
    ) -> Tensor:
        q, k, v = heads.block(query), heads.block(key), heads.block(value)
        scores = torch.baddbmm(heads.bias, q, k.transpose(1, 2), alpha=scaling)
        weights = scores.softmax(-1, dtype=torch.float32)
        kept, mask = torch.native_dropout(weights, dropout, True) if dropout else (weights, None)
        ctx.save_for_backward(q, k, v, weights, mask)
        ctx.heads, ctx.scaling, ctx.dropout = heads, scaling, dropout
        ctx.types = query.dtype, key.dtype, value.dtype
        return heads.flat(kept.to(v.dtype) @ v, value.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights, mask = ctx.saved_tensors
        heads, scaling = ctx.heads, ctx.scaling
        g = heads.block(gradient)
        # padding in the place of a query gives no gradient to keys and values
        g.view(-1, g.shape[-1]).index_fill_(0, heads.empty, 0.0)

        def dropped(x: Tensor) -> Tensor:
            return x if mask is None else x * mask / (1 - ctx.dropout)

        grad_v = dropped(weights).to(v.dtype).transpose(1, 2) @ g
        grad_weights = dropped((g @ v.transpose(1, 2)).float())
        grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, torch.float32).to(q.dtype)
        grad_q = torch.baddbmm(q, grad_scores, k, beta=0, alpha=scaling)
        grad_k = torch.baddbmm(k, grad_scores.transpose(1, 2), q, beta=0, alpha=scaling)
        grads = (heads.flat(grad, dtype) for grad, dtype in zip((grad_q, grad_k, grad_v), ctx.types, strict=True))
        return *grads, None, None, None


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **more: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each row. Shapes (1, heads, tokens, size); result (1, tokens, heads, size).

    Raises CannotPackError for anything else, such as windows, caps and sinks.
    """
    unknown = [name for name, given in more.items() if given is not None and name not in _UNDERSTOOD]
    if unknown or attention_mask is not None or more.get("is_causal") is False:
        raise CannotPackError(f"attention with {', '.join(unknown) or 'a mask of its own'}")
    device_type = query.device.type
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else value.dtype
    heads = ROWS.get().heads(query.shape[1], key.shape[1], dtype)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    dropout = dropout if module.training else 0.0
    attended: Tensor = _Attend.apply(query, key, value, heads, scaling, dropout)  # type: ignore[no-untyped-call]
    return attended.transpose(1, 2), None


AttentionInterface.register(NAME, attend)
