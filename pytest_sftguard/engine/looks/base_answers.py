"""The same questions, answered by the base alone; and what the rows that were trained on taught of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from pytest_sftguard.engine.adapter import adapters
from pytest_sftguard.engine.after import generation
from pytest_sftguard.engine.looks import InapplicableError, Look, Scene
from pytest_sftguard.records import BaseAnswersRecord

_BATCHES = 8
"""Micro-batches that the base's loss is the mean of: enough rows to even out, few passes."""


class BaseAnswers(Look):
    """Asks the reloaded model again, without its adapter."""

    needs = "reloaded"

    def conclude(self, scene: Scene) -> dict[str, Any]:
        """The base's answers, and the share of questions and of ends that the rows taught."""
        assert scene.trainer is not None
        assert scene.reloaded is not None
        words = scene.trainer.processing_class
        pairs = scene.target.pairs(scene.config.questions, words)
        if not pairs:
            raise InapplicableError("the target offers no questions(), or none is asked")
        batches = scene.watch.batches if scene.watch is not None else []
        ends = generation.end_tokens(scene.reloaded, words)
        rows = [(ids, labels) for batch in batches for ids, labels in _rows(batch)]
        budget = generation.budget(batches)
        model: Any = scene.reloaded
        if adapters.base_differs(model.peft_config[model.active_adapters[0]]):
            other: Any = scene.build("base").model  # the reloaded one is not its base without the adapter
            base = other.merge_and_unload().to(next(model.parameters()).device).eval()
            answers, loss = generation.answers(base, words, scene.target, pairs, budget), _loss(base, batches)
        else:
            with model.disable_adapter():
                answers, loss = generation.answers(model, words, scene.target, pairs, budget), _loss(model, batches)
        prompts = [_spelled(words(prompt + scene.target.answer_prefix)["input_ids"][:-1]) for prompt, _ in pairs]
        texts = [_spelled(ids) for ids, _ in rows]
        record = BaseAnswersRecord(
            answers=answers,
            taught=sum(any(prompt in text for text in texts) for prompt in prompts),
            rows=len(rows),
            ends_taught=sum(bool(ends & set(labels)) for _, labels in rows) if ends else None,
            loss=loss,
        )
        return {"base_answers": record}


def _loss(model: Any, batches: list[dict[str, Any]]) -> float | None:
    """Mean loss of the first micro-batches, as the model itself computes it."""
    losses = []
    for batch in batches[:_BATCHES]:
        inputs = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask", "labels")}
        with torch.no_grad():
            loss = model(**inputs).loss if len(inputs) == 3 else None
        if loss is not None and math.isfinite(loss.item()):  # a micro-batch without labels has none
            losses.append(loss.item())
    return math.fsum(losses) / len(losses) if losses else None


def _rows(batch: dict[str, Any]) -> Iterator[tuple[list[int], list[int]]]:
    """Token ids and labels of each row of a micro-batch that has both for each token."""
    ids, labels = batch.get("input_ids"), batch.get("labels")
    if isinstance(ids, torch.Tensor) and isinstance(labels, torch.Tensor) and ids.shape == labels.shape:
        yield from zip(ids.tolist(), labels.tolist(), strict=True)


def _spelled(ids: list[int]) -> str:
    """Token ids as text in which one list of them can be looked for in another.

    The last token of a prompt is left out by the caller: it may merge with what follows.
    """
    return " " + " ".join(map(str, ids)) + " "
