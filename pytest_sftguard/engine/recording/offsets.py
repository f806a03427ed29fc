"""Losses that are the model's own and a number beside it: what is added changes the loss, and no gradient."""

from __future__ import annotations

from typing import Any

from torch import Tensor

_KEEPS = ("ToCopyBackward0", "CloneBackward0", "AliasBackward0", "ViewBackward0", "SqueezeBackward0")
"""Nodes of the graph that give on their one input as it is, in another type or form."""
_LONGEST = 8
"""Most operations between the model's loss and that of the training."""


def only_offset(loss: Any, own: Any) -> bool:
    """Whether `loss` is the model's loss, made by the node `own`, with numbers added to it that no weight enters.

    Read off the graph of autograd, without a backward pass: between the two are nothing but additions whose other side
    needs no gradient.
    """
    if own is None or not isinstance(loss, Tensor) or loss.numel() != 1:
        return False
    node: Any = loss.grad_fn
    for _ in range(_LONGEST):
        if node is None:
            return False
        if node is own:
            return True
        before = [(place, n) for place, (n, _) in enumerate(node.next_functions) if n is not None]
        if len(before) != 1 or not _keeps(node, before[0][0]):
            return False
        node = before[0][1]
    return False


def _keeps(node: Any, place: int) -> bool:
    """Whether a node gives on its input at `place` with a factor of 1."""
    if node.name() in _KEEPS:
        return True
    if node.name() == "MulBackward0":
        # transformers multiplies by the number of processes
        factor = node._saved_other if place == 0 else None
        return isinstance(factor, Tensor) and factor.device.type == "cpu" and factor.numel() == 1 and bool(factor == 1)
    if node.name() not in ("AddBackward0", "SubBackward0"):
        return False
    # the second one is multiplied by alpha, and subtracted
    return place == 0 or (node.name() == "AddBackward0" and getattr(node, "_saved_alpha", 1) == 1)
