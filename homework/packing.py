"""Rows without padding: all tokens of a micro-batch in one line, apart only where they attend to each other.

Everything in a transformer but attention treats each token alone, so that padding is work for nothing there. Attention
itself is cheap where rows are short, and is computed on padded rows. transformers lets a function take the place of a
model's attention by name; this one is chosen for the forward passes of the training, and for no other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

NAME = "homework_short_rows"
_UNDERSTOOD = ("position_ids", "use_cache", "output_attentions", "is_causal", "cu_seq_lens_q", "cu_seq_lens_k")
_rows: ContextVar[Rows] = ContextVar("rows")


class CannotPackError(NotImplementedError):
    """An attention that does more than the common one."""


@dataclass(frozen=True)
class Rows:
    """Where the tokens of a micro-batch lie."""

    places: Tensor
    """Place of each token among all places of the padded rows, shape (tokens,)."""
    shape: tuple[int, int]
    """(rows, width)."""
    allowed: Tensor
    """Which place may look at which, shape (rows, 1, width, width)."""

    @classmethod
    def of(cls, attention_mask: Tensor) -> Rows:
        """The rows that a mask of shape (rows, width) describes."""
        there = attention_mask.bool()
        rows, width = there.shape
        causal = torch.ones(width, width, dtype=torch.bool, device=there.device).tril()
        return cls(there.flatten().nonzero()[:, 0], (rows, width), (causal & there[:, None, :])[:, None])

    def positions(self) -> Tensor:
        """Position of each token, as in padded rows, shape (1, tokens)."""
        return (self.places % self.shape[1])[None]

    def flat(self, padded: Tensor) -> Tensor:
        """What belongs to tokens, of (rows, width, ...) shape (1, tokens, ...)."""
        return padded.flatten(0, 1).index_select(0, self.places)[None]

    def padded(self, line: Tensor) -> Tensor:
        """Heads of tokens, shape (1, heads, tokens, size), as rows: shape (rows, heads, width, size), 0 elsewhere."""
        _, heads, tokens, size = line.shape
        places = line.new_zeros(self.shape[0] * self.shape[1], heads * size)
        filled = places.index_copy(0, self.places, line[0].transpose(0, 1).reshape(tokens, heads * size))
        return filled.view(*self.shape, heads, size).transpose(1, 2)


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

    Raises CannotPackError for what it does not know: windows, caps, sinks.
    """
    unknown = [name for name, given in more.items() if given is not None and name not in _UNDERSTOOD]
    if unknown or attention_mask is not None or more.get("is_causal") is False:
        raise CannotPackError(f"attention with {', '.join(unknown) or 'a mask of its own'}")
    rows, groups = _rows.get(), query.shape[1] // key.shape[1]
    q, k, v = rows.padded(query), rows.padded(key), rows.padded(value)
    count, heads, width, size = k.shape
    q = q.reshape(count, heads, groups * width, size)  # heads that share a key lie below each other
    scores = (q @ k.transpose(2, 3)) * (size**-0.5 if scaling is None else scaling)
    allowed = rows.allowed.repeat(1, 1, groups, 1)
    scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    weights = nn.functional.dropout(weights, dropout, module.training)
    attended = (weights @ v).view(count, heads * groups, width, size).transpose(1, 2)
    return rows.flat(attended), None


AttentionInterface.register(NAME, attend)


@contextlib.contextmanager
def packed(model: Any, rows: Rows) -> Iterator[None]:
    """Forward passes of `model` take tokens in one line; backward passes may come later."""
    config = model.config
    before, config._attn_implementation = config._attn_implementation, NAME
    token = _rows.set(rows)
    try:
        yield
    finally:
        _rows.reset(token)
        config._attn_implementation = before


_tried: dict[tuple[type, str, torch.dtype], bool] = {}


def can_pack(model: Any, batch: dict[str, Tensor]) -> bool:
    """Whether `model` gives the tokens of a batch the same logits in one line as in padded rows, tried out.

    A model whose tokens meet elsewhere than in attention does not: convolutions, recurrences, a router with capacities.
    It is tried once a process for each configuration.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    key = type(inner), inner.config.to_json_string(use_diff=False), next(model.parameters()).dtype
    if key not in _tried:
        _tried[key] = _agrees(model, batch)
    return _tried[key]


@torch.no_grad()
def _agrees(model: Any, batch: dict[str, Tensor]) -> bool:
    training = model.training
    model.eval()
    try:
        ids, mask = batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device)
        rows = Rows.of(mask)
        apart = rows.flat(model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float())
        with packed(model, rows):
            line = model(input_ids=rows.flat(ids), position_ids=rows.positions(), use_cache=False).logits.float()
        tolerance = 1e-4 if next(model.parameters()).dtype == torch.float32 else 5e-2
        return bool((line - apart).abs().max() <= tolerance * apart.abs().max())
    except (CannotPackError, TypeError, ValueError, RuntimeError):  # other models refuse such inputs in many ways
        return False
    finally:
        model.train(training)
