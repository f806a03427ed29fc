"""Rows without padding: all tokens of a micro-batch in one line, apart only where they attend to each other.

Everything in a transformer but attention treats each token alone, so that padding is work for nothing there. Attention
itself is cheap where rows are short, and is computed on padded rows. (Some padding can come along in the line, so that
it has a size that others have: see `Rows.of`.) transformers lets a function take the place of a model's attention by
name; this one is chosen for the forward passes of the training, and for no other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..trials import trial
from .attention import NAME, ROWS, CannotPackError
from .rows import Rows, missing

__all__ = ["CannotPackError", "Rows", "base_of", "can_pack", "missing", "packed"]


@contextlib.contextmanager
def packed(model: Any, rows: Rows) -> Iterator[None]:
    """Forward passes of `model` take tokens in one line; backward passes may come later."""
    config = model.config
    before, config._attn_implementation = config._attn_implementation, NAME
    token = ROWS.set(rows)
    try:
        yield
    finally:
        ROWS.reset(token)
        config._attn_implementation = before


def base_of(model: Any) -> Any:
    """The model that peft has wrapped, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


_tried: dict[tuple[type, str, torch.dtype], bool] = {}


def can_pack(model: Any, batch: dict[str, Tensor]) -> bool:
    """Whether `model` gives the tokens of a batch the same logits in one line as in padded rows, tried out.

    A model whose tokens meet elsewhere than in attention does not: convolutions, recurrences, a router with capacities.
    It is tried once a process for each configuration.
    """
    inner = base_of(model)
    key = type(inner), inner.config.to_json_string(use_diff=False), next(model.parameters()).dtype
    if key not in _tried:
        _tried[key] = _agrees(model, batch)
    return _tried[key]


def _agrees(model: Any, batch: dict[str, Tensor]) -> bool:
    try:
        ids, mask = batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device)
        rows = Rows.of(mask)
        with trial(model):
            apart = rows.flat(model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float())
            with packed(model, rows):
                line = model(input_ids=rows.flat(ids), position_ids=rows.positions(), use_cache=False).logits.float()
        tolerance = 1e-4 if next(model.parameters()).dtype == torch.float32 else 5e-2
        return bool((line - apart).abs().max() <= tolerance * apart.abs().max())
    except Exception:  # other models refuse such inputs in many ways
        return False
