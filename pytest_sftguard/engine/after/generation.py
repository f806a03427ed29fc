"""Asking the reloaded adapter: greedily, left-padded, from a seeded prefix, or in the target's own way."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pytest_sftguard.engine.after import forwards
from pytest_sftguard.engine.building.targets import Target, TargetError
from pytest_sftguard.records import AnswerRecord, GenerationRecord

_MAX_NEW_TOKENS = 32
_LONGEST = 128
"""New tokens at most, where the rows teach longer answers; see `records.learning.MAX_ANSWER_TOKENS`."""
_ROOM = 8
_TOKENS_OF_A_LOOP = 8


def answers(
    model: nn.Module, tokenizer: Any, target: Target, pairs: list[tuple[str, float]], budget: int = _MAX_NEW_TOKENS
) -> tuple[AnswerRecord, ...]:
    """Let `model` answer the prompts of `pairs`, and read its answers with the target's `parse_answer`.

    Greedy, so that a run can be repeated. Raises TargetError where the target offers questions but nothing to answer
    them with.
    """
    return ask(model, tokenizer, target, pairs, budget)[0]


def ask(
    model: nn.Module, tokenizer: Any, target: Target, pairs: list[tuple[str, float]], budget: int = _MAX_NEW_TOKENS
) -> tuple[tuple[AnswerRecord, ...], GenerationRecord | None]:
    """The same, and what was seen of the scores that the answers were decoded from; None where nothing was asked."""
    if not pairs:
        return (), None
    if target.parse_answer is None:
        raise TargetError(f"target {target.path} has questions() and no parse_answer(text) to read the answers with")
    prompts = [prompt + target.answer_prefix for prompt, _ in pairs]
    with watched(model) as scores:
        if target.generate is not None:
            texts, zero_ids = target.texts(model, tokenizer, prompts), 0
            stopped: list[bool | None] = [None] * len(texts)
        else:
            output, width = generated(model, tokenizer, target, prompts, max_new_tokens=budget)
            ids = output[:, width:]
            texts, zero_ids = tokenizer.batch_decode(ids, skip_special_tokens=True), _zero_ids(model, ids)
            ends = end_tokens(model, tokenizer)
            stopped = [any(i in ends for i in row) if ends else None for row in ids.tolist()]
    read = tuple(
        _answer(target, prompt, target.answer_prefix + text, expected, stop)
        for (prompt, expected), text, stop in zip(pairs, texts, stopped, strict=True)
    )
    return read, scores.record(prompts=len(prompts), own=target.generate is not None, zero_ids=zero_ids)


def generated(model: Any, tokenizer: Any, target: Target, prompts: list[str], **arguments: Any) -> tuple[Any, int]:
    """What `generate` makes of `prompts` greedily in one batch that is padded on the left, and the prompts' width."""
    batch = tokenized(model, tokenizer, target, prompts)
    with torch.no_grad():
        output = model.generate(**batch, do_sample=False, pad_token_id=tokenizer.pad_token_id, **arguments)
    return output, batch["input_ids"].shape[1]


def tokenized(model: Any, tokenizer: Any, target: Target, prompts: list[str]) -> dict[str, Tensor]:
    """One batch of `prompts`, padded on the left, on the device of `model`."""
    if tokenizer is None or not callable(tokenizer):
        raise TargetError(f"target {target.path} has questions(), but its Trainer has no tokenizer as processing_class")
    side, tokenizer.padding_side = tokenizer.padding_side, "left"  # the next token must follow the prompt, not padding
    try:
        batch = tokenizer(prompts, return_tensors="pt", padding=True)
    finally:
        tokenizer.padding_side = side
    device = next(model.parameters()).device
    return {k: v.to(device) for k, v in batch.items() if k in ("input_ids", "attention_mask")}


@dataclass
class Scores:
    """The next-token scores of every forward pass, reduced at once: nothing of the vocabulary's size is kept."""

    rows: int = 0
    """Rows of scores."""
    bad: list[Tensor] | None = None
    """For each forward pass, how many of its rows are not finite."""
    best: list[tuple[Tensor, Tensor, Tensor]] | None = None
    """For each, the two best ids, their scores, and the largest absolute score of its first row, where asked for."""

    def record(self, *, prompts: int, own: bool, zero_ids: int) -> GenerationRecord:
        """What was seen, as numbers."""
        counts = torch.stack([b.cpu() for b in self.bad]).tolist() if self.bad else []
        return GenerationRecord(
            prompts=prompts,
            own=own,
            forwards=len(counts),
            scores=self.rows,
            nonfinite=sum(counts),
            first_nonfinite=next((i for i, n in enumerate(counts, 1) if n), None),
            zero_ids=zero_ids,
        )


@contextlib.contextmanager
def watched(model: Any, *, best: bool = False) -> Iterator[Scores]:
    """Look at the last token's scores of every forward pass of `model`; with `best`, keep the two best ids as well."""
    scores = Scores(bad=[], best=[] if best else None)

    def look(module: Any, inputs: Any, output: Any) -> None:
        logits = getattr(output, "logits", None)
        if not isinstance(logits, Tensor) or logits.ndim != 3 or not logits.numel():
            return
        last = logits.detach()[:, -1]
        scores.rows += len(last)
        assert scores.bad is not None
        scores.bad.append(forwards.nonfinite(last).sum())
        if scores.best is not None:
            top = last[0].float().topk(min(2, last.shape[-1]))
            scores.best.append((top.indices.cpu(), top.values.cpu(), last[0].float().abs().max().cpu()))

    # a PeftModel calls the forward method of the model within, past its hooks; `generate` calls the model within
    hooks = [m.register_forward_hook(look) for m in {id(m): m for m in (model, forwards.inner(model))}.values()]
    try:
        yield scores
    finally:
        for hook in hooks:
            hook.remove()


def _zero_ids(model: Any, ids: Tensor) -> int:
    """How many rows are the id 0 over and over; where 0 ends a text, it fills up what is over."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if ids.shape[1] < _TOKENS_OF_A_LOOP or 0 in (ends if isinstance(ends, (list, tuple)) else [ends]):
        return 0
    return int((ids == 0).all(dim=1).sum())


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
        raise TargetError(f"parse_answer of target {target.path} must return a number or None, and returned {parsed!r}")
    number = None if parsed is None else float(parsed)
    return AnswerRecord(prompt=prompt, text=text, expected=expected, parsed=number, stopped=stopped)
