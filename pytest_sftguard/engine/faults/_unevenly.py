"""Rows of uneven supervised length: where all rows have as many labels, no wrong mean over them shows."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import Trainer


def unevenly(trainer: Trainer) -> Trainer:
    """`trainer` with a second question and answer in every other row, where its rows all have as many labels."""
    rows = trainer.train_dataset
    plain = isinstance(rows, list) and all(isinstance(r, dict) and {"input_ids", "labels"} <= r.keys() for r in rows)
    if plain and len({sum(label != -100 for label in r["labels"]) for r in rows}) == 1:
        following = itertools.cycle(rows[1:] + rows[:1])
        trainer.train_dataset = [
            _both(row, after) if i % 2 else row for i, (row, after) in enumerate(zip(rows, following, strict=False))
        ]
    return trainer


def _both(row: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Two rows in one, which begins once."""
    skipped = 1 if row["input_ids"][:1] == after["input_ids"][:1] else 0
    joined = {key: [*row[key], *after[key][skipped:]] for key in ("input_ids", "labels")}
    mask = {"attention_mask": [1] * len(joined["input_ids"])} if "attention_mask" in row else {}
    return joined | mask
