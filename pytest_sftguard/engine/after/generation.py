"""Answers of a model: greedy and left-padded after a seeded prefix, or by the target's own `generate`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pytest_sftguard.engine.after import forwards
from pytest_sftguard.engine.building.targets import Target, TargetError
from pytest_sftguard.records import AnswerRecord, GenerationRecord

_MAX_NEW_TOKENS = 32
_LONGEST = 128
"""Most new tokens, if the rows teach longer answers; see `records.learning.MAX_ANSWER_TOKENS`."""
_ROOM = 8
_TOKENS_OF_A_LOOP = 8


def ask(
    model: nn.Module,
    tokenizer: Any,
    target: Target,
    pairs: list[tuple[str, float]],
    budget: int = _MAX_NEW_TOKENS,
    kept: list[tuple[list[str], Tensor]] | None = None,
) -> tuple[tuple[AnswerRecord, ...], GenerationRecord | None]:
    """Answers of `model` to the prompts of `pairs`, and a record of the scores behind them; None without a question.

    Greedy, so that a run can be repeated; `kept` receives the prompts, and the ids that the guard itself has generated.
    Raises TargetError if the target has questions but no `parse_answer` or tokenizer.
    """
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
            if kept is not None:
                kept.append((prompts, output))
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
    """Greedy output of `generate` for `prompts` in one batch, padded on the left, and the width of the prompts."""
    batch = tokenized(model, tokenizer, target, prompts)
    with torch.no_grad():
        output = model.generate(**batch, do_sample=False, pad_token_id=tokenizer.pad_token_id, **arguments)
    return output, batch["input_ids"].shape[1]


def tokenized(model: Any, tokenizer: Any, target: Target, prompts: list[str]) -> dict[str, Tensor]:
    """One batch of `prompts`, padded on the left, on the device of `model`."""
    if tokenizer is None or not callable(tokenizer):
        raise TargetError(f"target {target.path} has questions(), but its Trainer has no tokenizer as processing_class")
    # the next token must follow the prompt, not padding
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    try:
        batch = tokenizer(prompts, return_tensors="pt", padding=True)
    finally:
        tokenizer.padding_side = side
    device = next(model.parameters()).device
    return {k: v.to(device) for k, v in batch.items() if k in ("input_ids", "attention_mask")}


@dataclass
class Scores:
    """The next-token scores of every forward pass, reduced immediately: nothing as large as the vocabulary is kept."""

    rows: int = 0
    """Number of rows of scores."""
    bad: list[Tensor] = field(default_factory=list)
    """Number of rows that are not finite, for each forward pass."""
    best: list[tuple[Tensor, Tensor, Tensor]] | None = None
    """Two best ids of the first row, their scores, and its largest absolute score, for each forward pass; or None."""

    def record(self, *, prompts: int, own: bool, zero_ids: int) -> GenerationRecord:
        """The scores as a record."""
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
    """Collect the last token's scores of every forward pass of `model`; with `best`, the two best ids as well."""
    scores = Scores(best=[] if best else None)

    def look(module: Any, inputs: Any, output: Any) -> None:
        logits = getattr(output, "logits", None)
        if not isinstance(logits, Tensor) or logits.ndim != 3 or not logits.numel():
            return
        last = logits.detach()[:, -1]
        scores.rows += len(last)
        scores.bad.append(forwards.nonfinite(last).sum())
        if scores.best is not None:
            top = last[0].float().topk(min(2, last.shape[-1]))
            scores.best.append((top.indices.cpu(), top.values.cpu(), last[0].float().abs().max().cpu()))

    # a PeftModel calls the inner model's forward method, without its hooks; `generate` calls the inner model
    hooks = [m.register_forward_hook(look) for m in {id(m): m for m in (model, forwards.inner(model))}.values()]
    try:
        yield scores
    finally:
        for hook in hooks:
            hook.remove()


def _zero_ids(model: Any, ids: Tensor) -> int:
    """Number of rows that repeat the id 0; none if 0 is an end token, which fills the rest of a row."""
    if ids.shape[1] < _TOKENS_OF_A_LOOP or 0 in end_tokens(model, None):
        return 0
    return int((ids == 0).all(dim=1).sum())


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """The ids at which generation stops; empty if there are none."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if ends is None:
        ends = getattr(tokenizer, "eos_token_id", None)
    if ends is None:
        return set()
    return {int(e) for e in ends} if isinstance(ends, (list, tuple)) else {int(ends)}


def budget(batches: list[dict[str, Any]]) -> int:
    """Largest number of new tokens in an answer: more than usual if the rows of `batches` teach longer ones.

    Rows with a supervised prompt do not tell the length of an answer, and are ignored.
    """
    taught = [labels != -100 for _, labels in labelled(batches)]
    longest = max((int(t.sum(1).max()) for t in taught if not t[:, :2].any()), default=0)
    return min(_LONGEST, max(_MAX_NEW_TOKENS, longest + _ROOM))


def labelled(batches: Iterable[dict[str, Any]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Ids and labels of the batches with a label for each id, both of shape (rows, tokens)."""
    for batch in batches:
        ids, labels = batch.get("input_ids"), batch.get("labels")
        if isinstance(ids, Tensor) and isinstance(labels, Tensor) and labels.dim() == 2 and ids.shape == labels.shape:
            yield ids, labels


def _answer(target: Target, prompt: str, text: str, expected: float, stopped: bool | None) -> AnswerRecord:
    assert target.parse_answer is not None
    parsed = target.parse_answer(text)
    if parsed is not None and (isinstance(parsed, bool) or not isinstance(parsed, (int, float))):
        raise TargetError(f"parse_answer of target {target.path} must return a number or None, and returned {parsed!r}")
    number = None if parsed is None else float(parsed)
    return AnswerRecord(prompt=prompt, text=text, expected=expected, parsed=number, stopped=stopped)
