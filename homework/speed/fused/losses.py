"""The cross-entropy of each token, a few rows of logits at a time.

torch's own makes four matrices as large as the logits, in float32: with a vocabulary of 49,152 that is more memory than
all layers of a small model fill, written and read once each. Here a block of rows goes through the processor's cache,
and what is left of it is a number a row, or its gradient in the type of the logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_BLOCK = 2**19
"""Logits that are looked at together."""


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        largest, total = (logits.new_empty(len(logits), 1, dtype=torch.float32) for _ in range(2))
        for part in _blocks(logits):
            largest[part] = logits[part].amax(-1, keepdim=True)
            torch.sum((logits[part] - largest[part]).exp_(), -1, keepdim=True, out=total[part])
        ctx.save_for_backward(logits, targets, largest, total)
        # in this order, so that a small loss keeps its digits where logits are large
        return ((largest - logits.gather(1, targets[:, None])) + total.log())[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, targets, largest, total = ctx.saved_tensors
        of_logits = torch.empty_like(logits)
        in_place = logits.dtype == torch.float32
        for part in _blocks(logits):
            weight = gradient[part, None]
            shares = torch.sub(logits[part], largest[part], out=of_logits[part] if in_place else None)
            shares.exp_().mul_(weight / total[part]).scatter_add_(1, targets[part, None], -weight)
            if not in_place:
                of_logits[part] = shares
        return of_logits, None


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of each row of `logits`, in nats and float32, shape (tokens,).

    `logits` have shape (tokens, vocabulary); `targets` are token ids, shape (tokens,). There is a first
    derivative, and no second one.
    """
    losses: Tensor = _TokenLosses.apply(logits, targets)  # type: ignore[no-untyped-call]
    return losses


def _blocks(logits: Tensor) -> Iterator[slice]:
    rows = max(1, _BLOCK // logits.shape[1])
    return (slice(begin, begin + rows) for begin in range(0, len(logits), rows))
