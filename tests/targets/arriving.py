"""Trainings whose collators change rows, by mistake or on purpose."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, BertConfig, DataCollatorWithFlattening, Trainer

from pytest_sftguard.engine.models import tiny
from tests.targets.healthy import BERT, built


def _after(change: Callable[[dict[str, Any]], object]) -> Callable[[Any], dict[str, Any]]:
    """The tiny model's collator, and a change of its batch."""

    def collate(features: Any) -> dict[str, Any]:
        batch = tiny.collate(features)
        change(batch)
        return batch

    return collate


def one_token_hidden(**arguments: Any) -> Trainer:
    """The mask leaves out one token of one row of each batch."""
    return built(arguments, collator=_after(lambda b: b["attention_mask"][-1:, 2].zero_()))


def end_token_overwritten(**arguments: Any) -> Trainer:
    """The last row of each batch has another token in one place before its labels."""
    return built(arguments, collator=_after(lambda b: b["input_ids"][-1:, 1].fill_(60)))


def label_dropped(**arguments: Any) -> Trainer:
    """The last label of the first row of each batch is not learned."""

    def drop(batch: dict[str, Any]) -> None:
        labels = batch["labels"][0]
        labels[int((labels != -100).nonzero()[-1])] = -100

    return built(arguments, collator=_after(drop))


def batches_mixed_up(**arguments: Any) -> Trainer:
    """From the second batch on, the first row's mask is that of the batch before."""
    kept: list[Any] = []

    def mix(batch: dict[str, Any]) -> None:
        kept.append(batch["attention_mask"][0].clone())
        if len(kept) > 1:
            width = min(len(kept[-2]), batch["attention_mask"].shape[1])
            batch["attention_mask"][0, :width] = kept[-2][:width]

    return built(arguments, collator=_after(mix))


def tokens_dropped_at_random(**arguments: Any) -> Trainer:
    """An augmentation: tokens of the prompt are hidden at random, on purpose."""
    draw = random.Random(0)

    def hide(batch: dict[str, Any]) -> None:
        batch["attention_mask"][:, 1 + draw.randrange(2)] = 0

    return built(arguments, collator=_after(hide))


def flattened(**arguments: Any) -> Trainer:
    """A collator of transformers puts rows end to end."""
    return built(arguments, collator=DataCollatorWithFlattening())


def longest_first(**arguments: Any) -> Trainer:
    """The collator sorts its rows, and truncates them to 16 tokens."""

    def collate(features: Any) -> dict[str, Any]:
        rows = sorted(features, key=lambda f: -len(f["input_ids"]))
        return tiny.collate([{k: v[:16] for k, v in f.items()} for f in rows])

    return built(arguments, collator=collate)


def collated_by_workers(**arguments: Any) -> Trainer:
    """Rows are collated in other processes."""
    return built(arguments | {"dataloader_num_workers": 1})


def classes_changed(**arguments: Any) -> Trainer:
    """The class of the first row of each batch is another one."""
    return _classifier(arguments, lambda labels: [(labels[0] + 1) % 3, *labels[1:]])


def classes_numbered_anew(**arguments: Any) -> Trainer:
    """The collator gives each class another number."""
    return _classifier(arguments, lambda labels: [2 - label for label in labels])


def _classifier(arguments: dict[str, Any], change: Callable[[list[int]], list[int]]) -> Trainer:
    rows = [{"input_ids": r["input_ids"], "label": len(r["input_ids"]) % 3} for r in tiny.rows(64)]

    def collate(features: Any) -> dict[str, Any]:
        batch = tiny.collate([{"input_ids": f["input_ids"], "labels": f["input_ids"]} for f in features])
        return batch | {"labels": torch.tensor(change([f["label"] for f in features]))}

    return built(
        arguments,
        config=BertConfig(**BERT),
        auto=AutoModelForSequenceClassification,
        lora={"task_type": "SEQ_CLS", "target_modules": ["query", "value"]},
        dataset=rows,
        collator=collate,
    )
