"""Collating: changes to the batches between a Trainer's collator and its model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import Trainer

from pytest_sftguard.engine.faults.fault import NotApplicableError

IGNORED = -100
"""The label of a token that the loss leaves out."""


def collating(trainer: Trainer, change: Callable[[Any], object]) -> None:
    """Call `change` with each batch that the collator of `trainer` makes; it changes the batch in place."""
    collate = trainer.data_collator

    def changed(features: Any) -> Any:
        batch = collate(features)
        change(batch)
        return batch

    if not callable(collate):
        raise NotApplicableError("the target's Trainer has no collator")
    trainer.data_collator = changed


def supervised(batch: Any) -> Tensor:
    """Whether each token has a label, shape (rows, tokens)."""
    found: Tensor = batch["labels"] != IGNORED
    return found


def in_prompt(batch: Any) -> Tensor:
    """Whether each token is attended and stands before the first label of its row, shape (rows, tokens)."""
    before = supervised(batch).int().cumsum(1) == 0
    mask = batch.get("attention_mask")
    return before if mask is None else before & mask.bool()
