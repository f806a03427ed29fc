"""Asking the reloaded adapter: greedy generation, left-padded, from a seeded prefix."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pytest_sftguard.engine.targets import Target, TargetError
from pytest_sftguard.records import AnswerRecord

_MAX_NEW_TOKENS = 32
_LONGEST = 128
"""New tokens at most, where the rows teach longer answers; see `records.learning.MAX_ANSWER_TOKENS`."""
_ROOM = 8


def answers(
    model: nn.Module, tokenizer: Any, target: Target, pairs: list[tuple[str, float]], budget: int = _MAX_NEW_TOKENS
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
        output = generate(**batch, do_sample=False, max_new_tokens=budget, pad_token_id=tokenizer.pad_token_id)
    new = output[:, batch["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(new, skip_special_tokens=True)
    ends = end_tokens(model, tokenizer)
    stopped = [any(i in ends for i in ids) if ends else None for ids in new.tolist()]
    return tuple(
        _answer(target, prompt, target.answer_prefix + text, expected, stop)
        for (prompt, expected), text, stop in zip(pairs, texts, stopped, strict=True)
    )


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """The ids that generation stops at; empty where there is none."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if ends is None:
        ends = getattr(tokenizer, "eos_token_id", None)
    if ends is None:
        return set()
    return {int(e) for e in ends} if isinstance(ends, (list, tuple)) else {int(ends)}


def budget(batches: list[dict[str, Any]]) -> int:
    """How many new tokens an answer may have: more than usual where the rows of `batches` teach longer ones.

    Rows whose prompt is supervised too say nothing of an answer's length.
    """
    longest = 0
    for batch in batches:
        labels, ids = batch.get("labels"), batch.get("input_ids")
        if not (isinstance(labels, torch.Tensor) and isinstance(ids, torch.Tensor) and labels.shape == ids.shape):
            continue
        taught = labels != -100
        if labels.dim() == 2 and not taught[:, :2].any():
            longest = max(longest, int(taught.sum(1).max()))
    return min(_LONGEST, max(_MAX_NEW_TOKENS, longest + _ROOM))


def _answer(target: Target, prompt: str, text: str, expected: float, stopped: bool | None) -> AnswerRecord:
    assert target.parse_answer is not None
    parsed = target.parse_answer(text)
    if parsed is not None and (isinstance(parsed, bool) or not isinstance(parsed, (int, float))):
        raise TargetError(f"parse_answer of target {target.path} must give a number or None, and gave {parsed!r}")
    number = None if parsed is None else float(parsed)
    return AnswerRecord(prompt=prompt, text=text, expected=expected, parsed=number, stopped=stopped)
