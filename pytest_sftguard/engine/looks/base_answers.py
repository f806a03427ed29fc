"""The same questions, answered by the base alone, and how much of them the rows that were trained on taught."""

from __future__ import annotations

import math
from typing import Any

import torch

from pytest_sftguard.engine.adapter import adapters
from pytest_sftguard.engine.after import generation
from pytest_sftguard.engine.looks import InapplicableError, Look
from pytest_sftguard.engine.stages import Reloaded
from pytest_sftguard.records import BaseAnswersRecord

_BATCHES = 8
"""Micro-batches that the base's loss is averaged over: enough rows for a stable mean, few forward passes."""


class BaseAnswers(Look[Reloaded]):
    """Asks the reloaded model again, without its adapter."""

    def conclude(self, reached: Reloaded) -> dict[str, Any]:
        """Return the base's answers, and how many questions and ends of answers the rows taught."""
        tokenizer, target, batches = reached.trainer.processing_class, reached.target, reached.batches
        model: Any = reached.reloaded_model
        pairs = target.pairs(reached.config.questions, tokenizer)
        if not pairs:
            raise InapplicableError("the target offers no questions(), or none is asked")
        ends = generation.end_tokens(model, tokenizer)
        labelled = generation.labelled(batches)
        rows = [row for ids, labels in labelled for row in zip(ids.tolist(), labels.tolist(), strict=True)]
        budget = generation.budget(batches)
        config = adapters.config_of(model)
        if config is None or adapters.base_differs(config):
            # without its adapter, if it has one, the reloaded model is not its base
            other: Any = reached.build("base").model
            base = (other if config is None else other.merge_and_unload()).to(next(model.parameters()).device).eval()
            (answers, _), loss = generation.ask(base, tokenizer, target, pairs, budget), _loss(base, batches)
        else:
            with adapters.disabled(model):
                (answers, _), loss = generation.ask(model, tokenizer, target, pairs, budget), _loss(model, batches)
        # the last token of a prompt may merge with the text after it
        prompts = [_spelled(tokenizer(prompt + target.answer_prefix)["input_ids"][:-1]) for prompt, _ in pairs]
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
    """Return the mean loss of the first micro-batches, as the model computes it; None where none has a finite one."""
    losses = []
    for batch in batches[:_BATCHES]:
        inputs = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask", "labels")}
        with torch.no_grad():
            loss = model(**inputs).loss if len(inputs) == 3 else None
        # a micro-batch in which every label is ignored has no finite loss
        if loss is not None and math.isfinite(loss.item()):
            losses.append(loss.item())
    return math.fsum(losses) / len(losses) if losses else None


def _spelled(ids: list[int]) -> str:
    """Return token ids as a text, so that `in` tells whether one list of ids is part of another."""
    return " " + " ".join(map(str, ids)) + " "
