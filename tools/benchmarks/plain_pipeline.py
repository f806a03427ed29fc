"""The training pipeline that people copy, on the app's rows: the app is compared with it and timed beside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from homework import sft
from homework.speed.fused import unfuse
from homework.task.data import IGNORED

WIDTH = 128
"""Tokens that every row is padded to."""


def build_trainer(**arguments: Any) -> Trainer:
    """Return a plain Trainer of the app's model: rows padded to 128, checkpointed, all logits, peft's own layers."""
    built = sft.build_trainer(**arguments, gradient_checkpointing=True)
    unfuse(built.model)
    return Trainer(model=built.model, args=built.args, train_dataset=built.train_dataset, data_collator=_padded)


def _padded(rows: Any) -> dict[str, Tensor]:
    fills = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}
    return {
        name: torch.tensor([list(row[name]) + [fill] * (WIDTH - len(row[name])) for row in rows])
        for name, fill in fills.items()
    }
