"""Asking the reloaded adapter: greedy generation, left-padded, from a seeded prefix."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pytest_sftguard.engine.targets import Target, TargetError
from pytest_sftguard.records import AnswerRecord

_MAX_NEW_TOKENS = 32


def answers(
    model: nn.Module, tokenizer: Any, target: Target, pairs: list[tuple[str, float]]
) -> tuple[AnswerRecord, ...]:
    """Let `model` answer the prompts of `pairs`, and read its answers with the target's `parse_answer`.

    Greedy, so that a run can be repeated. Raises TargetError where the target offers questions but nothing to answer
    them with.
    """
    if not pairs:
        return ()
    if target.parse_answer is None:
        raise TargetError(f"target {target.path} has questions() and no parse_answer(text) to read the answers with")
    if tokenizer is None or not callable(tokenizer):
        raise TargetError(f"target {target.path} has questions(), but its Trainer has no tokenizer as processing_class")
    prompts = [prompt + target.answer_prefix for prompt, _ in pairs]
    side, tokenizer.padding_side = tokenizer.padding_side, "left"  # the next token must follow the prompt, not padding
    try:
        batch = tokenizer(prompts, return_tensors="pt", padding=True)
    finally:
        tokenizer.padding_side = side
    batch = {k: v.to(next(model.parameters()).device) for k, v in batch.items() if k in ("input_ids", "attention_mask")}
    generate: Any = model.generate
    with torch.no_grad():
        output = generate(**batch, do_sample=False, max_new_tokens=_MAX_NEW_TOKENS, pad_token_id=tokenizer.pad_token_id)
    texts = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return tuple(
        _answer(target, prompt, target.answer_prefix + text, expected)
        for (prompt, expected), text in zip(pairs, texts, strict=True)
    )


def _answer(target: Target, prompt: str, text: str, expected: float) -> AnswerRecord:
    assert target.parse_answer is not None
    parsed = target.parse_answer(text)
    if parsed is not None and (isinstance(parsed, bool) or not isinstance(parsed, (int, float))):
        raise TargetError(f"parse_answer of target {target.path} must give a number or None, and gave {parsed!r}")
    return AnswerRecord(prompt=prompt, text=text, expected=expected, parsed=None if parsed is None else float(parsed))
