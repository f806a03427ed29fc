"""Collating otherwise than the target does: what the model is given is changed on its way."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import Trainer

IGNORED = -100


def collating(trainer: Trainer, change: Callable[[Any], None]) -> Trainer:
    """`trainer` with a collator that hands each batch to `change` before the model sees it."""
    from pytest_sftguard.engine.faults import NotApplicableError

    collate = trainer.data_collator

    def changed(features: Any) -> Any:
        batch = collate(features)
        change(batch)
        return batch

    if not callable(collate):
        raise NotApplicableError("the target's Trainer has no collator")
    trainer.data_collator = changed
    return trainer


def supervised(batch: Any) -> Any:
    """Which labels of a batch count, shape (rows, tokens)."""
    return batch["labels"] != IGNORED


def in_prompt(batch: Any) -> Any:
    """Which places are attended and before the first label that counts, shape (rows, tokens)."""
    before = supervised(batch).int().cumsum(1) == 0
    mask = batch.get("attention_mask")
    return before if mask is None else before & mask.bool()


def insert(batch: Any, places: Any, token: int) -> None:
    """Put one more `token` before each row's place of `places`, shape (rows,), unsupervised; the batch grows by one.

    Positions of a longer batch are left to the model.
    """
    import torch

    for name, fill in (("input_ids", token), ("labels", IGNORED), ("attention_mask", 1)):
        if name not in batch:
            continue
        rows = []
        for row, place in zip(batch[name], places.tolist(), strict=True):
            rows.append(torch.cat([row[:place], row.new_tensor([fill]), row[place:]]))
        batch[name] = torch.stack(rows)
    batch.pop("position_ids", None)
