"""The sums, answered in ways of one's own: each function is a target that brings `generate` along.

A target's `generate` is looked for in its module, so that the functions here lend theirs to the one below.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pytest_sftguard.engine.models import sums


def build_trainer(**arguments: Any) -> Any:
    """The sums, with dropout in the adapter."""
    trainer = sums.build_trainer(**arguments)
    for module in trainer.model.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = torch.nn.Dropout(0.1)
    trainer.model.peft_config["default"].lora_dropout = 0.1
    return trainer


questions = sums.questions
parse_answer = sums.parse_answer
_way: list[Any] = []


@contextmanager
def answered(method: Any) -> Iterator[str]:
    """While this is active, `generate` is `method`; gives the path of the target."""
    _way.append(method)
    try:
        yield f"{__name__}:build_trainer"
    finally:
        _way.pop()


def generate(model: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
    """As the way that is active."""
    return _way[-1](model, tokenizer, prompts)


def padded_left(model: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
    """Right: padding by hand, before the prompts."""
    return _answers(model, tokenizer, prompts, left=True)


def padded_right(model: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
    """Wrong: padding between the prompts and what is predicted."""
    return _answers(model, tokenizer, prompts, left=False)


def without_the_adapter(model: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
    """Wrong: the base answers."""
    with model.disable_adapter():
        return padded_left(model, tokenizer, prompts)


def unloading(model: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
    """Wrong: the adapter is taken out, and stays out."""
    for layer in model.modules():
        if hasattr(layer, "_disable_adapters"):
            layer._disable_adapters = True
    return padded_left(model, tokenizer, prompts)


def sampling(model: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
    """Wrong: `do_sample` was left on."""
    return _answers(model, tokenizer, prompts, left=True, do_sample=True, temperature=1.0)


def in_training_mode(model: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
    """Wrong: dropout is active while it answers, and afterwards."""
    model.train()
    return padded_left(model, tokenizer, prompts)


def left_in_training_mode(model: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
    """Wrong: what comes after it drops activations."""
    answers = padded_left(model, tokenizer, prompts)
    model.train()
    return answers


def truncated(model: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
    """Wrong: a limit of three tokens for a prompt, as a short `max_length` makes it."""
    return _answers(model, tokenizer, prompts, left=True, keep=3)


def without_mask(model: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
    """Wrong: padding counts as text."""
    return _answers(model, tokenizer, prompts, left=True, masked=False)


def with_beams(model: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
    """Right: two beams."""
    return _answers(model, tokenizer, prompts, left=True, num_beams=2)


def with_penalty(model: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
    """Right: a penalty for repetition."""
    return _answers(model, tokenizer, prompts, left=True, repetition_penalty=1.2)


def one_by_one(model: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
    """Right: no batch at all, and the mode is restored."""
    before = model.training
    model.eval()
    answers = [_answers(model, tokenizer, [p], left=True)[0] for p in prompts]
    model.train(before)
    return answers


def by_hand(model: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
    """Right: a loop of one's own, without a cache, padded on the right and read at the last token of each prompt."""
    rows = [tokenizer(p)["input_ids"] for p in prompts]
    answers: list[list[int]] = [[] for _ in rows]
    for _ in range(3):
        width = max(map(len, rows))
        ids = torch.tensor([r + [tokenizer.pad_token_id] * (width - len(r)) for r in rows])
        held = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=held).logits
        best = [int(logits[i, len(r) - 1].argmax()) for i, r in enumerate(rows)]
        answers = [[*a, b] for a, b in zip(answers, best, strict=True)]
        rows = [[*r, b] for r, b in zip(rows, best, strict=True)]
    return list(tokenizer.batch_decode(answers, skip_special_tokens=True))


def merged(model: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
    """Right: a merged copy answers."""
    return padded_left(copy.deepcopy(model).merge_and_unload(), tokenizer, prompts)


def too_few(model: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
    """One text for all."""
    return ["7"]


def _answers(
    model: Any, tokenizer: Any, prompts: list[str], *, left: bool, keep: int = 0, masked: bool = True, **options: Any
) -> list[str]:
    rows = [tokenizer(p)["input_ids"][-keep:] for p in prompts]
    width = max(map(len, rows))
    pads = [[tokenizer.pad_token_id] * (width - len(r)) for r in rows]
    ids = torch.tensor([pad + r if left else r + pad for pad, r in zip(pads, rows, strict=True)])
    held = (ids != tokenizer.pad_token_id).long() if masked else torch.ones_like(ids)
    wanted = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": tokenizer.pad_token_id} | options
    made = model.generate(input_ids=ids, attention_mask=held, **wanted)
    return tokenizer.batch_decode(made[:, width:], skip_special_tokens=True)
