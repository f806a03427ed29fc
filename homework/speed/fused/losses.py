"""The cross-entropy of each token, a block of rows of logits at a time.

torch's own makes four float32 matrices as large as the logits: with a vocabulary of 49,152 that is more memory than all
layers of a small model need. Here each block stays in the processor's cache, and leaves one number per row, or its
gradient in the dtype of the logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_BLOCK = 2**19
"""Number of logits in a block."""


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        largest, total = (logits.new_empty(len(logits), 1, dtype=torch.float32) for _ in range(2))
        for part in _blocks(logits):
            largest[part] = logits[part].amax(-1, keepdim=True)
            torch.sum((logits[part] - largest[part]).exp_(), -1, keepdim=True, out=total[part])
        ctx.save_for_backward(logits, targets, largest, total)
        # this order keeps the digits of a small loss where logits are large
        return ((largest - logits.gather(1, targets[:, None])) + total.log())[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, targets, largest, total = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)
        in_place = logits.dtype == torch.float32
        for part in _blocks(logits):
            weight = gradient[part, None]
            grad = torch.sub(logits[part], largest[part], out=grad_logits[part] if in_place else None)
            grad.exp_().mul_(weight / total[part]).scatter_add_(1, targets[part, None], -weight)
            if not in_place:
                grad_logits[part] = grad
        return grad_logits, None


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of each row of `logits`, in nats and float32, shape (tokens,).

    `logits` have shape (tokens, vocabulary); `targets` are token ids, shape (tokens,). Has no second derivative.
    """
    losses: Tensor = _TokenLosses.apply(logits, targets)  # type: ignore[no-untyped-call]
    return losses


def _blocks(logits: Tensor) -> Iterator[slice]:
    rows = max(1, _BLOCK // logits.shape[1])
    return (slice(begin, begin + rows) for begin in range(0, len(logits), rows))
