"""The sums, answered in ways of one's own: each function is a target that brings `generate` along.

A target's `generate` is looked for in its module, so that the functions here lend theirs to the one below.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pytest_sftguard.engine.models import sums


def build_trainer(**arguments: Any) -> Any:
    """The sums."""
    return sums.build_trainer(**arguments)


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


def too_few(model: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
    """One text for all."""
    return ["7"]


def _answers(model: Any, tokenizer: Any, prompts: list[str], *, left: bool) -> list[str]:
    rows = [tokenizer(p)["input_ids"] for p in prompts]
    width = max(map(len, rows))
    pads = [[tokenizer.pad_token_id] * (width - len(r)) for r in rows]
    ids = torch.tensor([pad + r if left else r + pad for pad, r in zip(pads, rows, strict=True)])
    held = (ids != tokenizer.pad_token_id).long()
    made = model.generate(
        input_ids=ids, attention_mask=held, max_new_tokens=4, do_sample=False, pad_token_id=tokenizer.pad_token_id
    )
    return tokenizer.batch_decode(made[:, width:], skip_special_tokens=True)
