"""Unpadded (varlen) micro-batches: the tokens of all rows in one sequence, padded only within attention.

Everything in a transformer but attention treats each token alone, so padding is wasted work there. Attention is cheap
where rows are short, and is computed on padded rows. transformers selects a model's attention function by name; ours is
selected during the forward passes of the training, and at no other time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..trials import trial
from .attention import NAME, ROWS, CannotPackError
from .rows import Rows, bucket_padding

__all__ = ["CannotPackError", "Rows", "base_of", "bucket_padding", "can_pack", "packed"]


@contextlib.contextmanager
def packed(model: Any, rows: Rows) -> Iterator[None]:
    """Let forward passes of `model` take the unpadded tokens of `rows`; backward passes may come later."""
    config = model.config
    before, config._attn_implementation = config._attn_implementation, NAME
    token = ROWS.set(rows)
    try:
        yield
    finally:
        ROWS.reset(token)
        config._attn_implementation = before


def base_of(model: Any) -> Any:
    """Return the model that peft has wrapped, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


_tried: dict[tuple[type, str, torch.dtype], bool] = {}


def can_pack(model: Any, batch: dict[str, Tensor]) -> bool:
    """Return whether a trial gives the tokens of `batch` the same logits unpadded as in padded rows.

    It does not where tokens also interact outside of attention: convolutions, recurrences, a router with capacities.
    Each configuration is tried once per process.
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
            padded = rows.flat(model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float())
            with packed(model, rows):
                flat = model(input_ids=rows.flat(ids), position_ids=rows.positions(), use_cache=False).logits.float()
        tolerance = 1e-4 if next(model.parameters()).dtype == torch.float32 else 5e-2
        return bool((flat - padded).abs().max() <= tolerance * padded.abs().max())
    # models refuse such inputs with errors of many types
    except Exception:
        return False
