"""Targets that learn to add, each with one thing wrong, or done differently, that shows only after the training."""

from __future__ import annotations

from typing import Any

from transformers import Trainer

from pytest_sftguard.engine.models import sums
from pytest_sftguard.engine.models.sums import parse_answer, questions

__all__ = ["parse_answer", "questions"]


def word_before_the_answer(**arguments: Any) -> Trainer:
    """In training alone a word stands between the prompt and the answer: the seam is another one at inference."""

    def inserted(row: Any, words: Any) -> Any:
        start = sum(label == -100 for label in row["labels"])
        ids, labels = row["input_ids"], row["labels"]
        extra = words.convert_tokens_to_ids("?")
        return {
            "input_ids": [*ids[:start], extra, *ids[start:]],
            "labels": [*labels[:start], -100, *labels[start:]],
        }

    return _with_rows(arguments, inserted)


def end_masked_as_padding(**arguments: Any) -> Trainer:
    """Padding and end are one token, and all of it is masked: no row teaches an end."""
    return _with_rows(arguments, lambda row, words: row | {"labels": [*row["labels"][:-1], -100]})


def answers_by_chance(**arguments: Any) -> Trainer:
    """Rows whose answers have nothing to do with their questions: the loss settles at the answers' entropy, soundly."""

    def shuffled(row: Any, words: Any) -> Any:
        other = words.convert_tokens_to_ids(str(20 + sum(row["input_ids"]) * 7919 % 23 % 16))
        return {
            "input_ids": [*row["input_ids"][:-2], other, row["input_ids"][-1]],
            "labels": [*row["labels"][:-2], other, row["labels"][-1]],
        }

    trainer = _with_rows(arguments, shuffled)
    # the same prompt with other answers cannot be learned by heart
    rows = list(trainer.train_dataset)
    numbers = [row["labels"][-2] for row in rows]
    trainer.train_dataset = [
        {"input_ids": [*r["input_ids"][:-2], n, r["input_ids"][-1]], "labels": [*r["labels"][:-2], n, r["labels"][-1]]}
        for i, r in enumerate(rows)
        for n in numbers[i:] + numbers[:i]
    ]
    return trainer


def _with_rows(arguments: dict[str, Any], change: Any) -> Trainer:
    trainer = sums.build_trainer(**arguments)
    words: Any = trainer.processing_class
    trainer.train_dataset = [change(row, words) for row in sums.rows(words)]
    return trainer
