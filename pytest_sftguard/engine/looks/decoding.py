"""The same prompts in one batch and one by one: a greedy answer must not depend on the prompts beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from pytest_sftguard.engine.after import forwards, generation
from pytest_sftguard.engine.looks import InapplicableError, Look
from pytest_sftguard.engine.stages import Reloaded
from pytest_sftguard.records import DecodingRecord, DifferenceRecord

_PROMPTS = 8
_CANDIDATES = 64
"""Questions of which the longest and the shortest are taken, so that the batch has padding."""
_NEW_TOKENS = 16


class Decoding(Look[Reloaded]):
    """Lets the reloaded adapter answer in a batch and alone: by the target's own `generate`, else greedily."""

    def conclude(self, reached: Reloaded) -> dict[str, Any]:
        """Answer in a batch and alone, and run one batch twice."""
        tokenizer, target, model = reached.trainer.processing_class, reached.target, reached.reloaded_model
        if not reached.config.questions or target.questions is None:
            raise InapplicableError("the target offers no questions()")
        pairs = target.pairs(max(_CANDIDATES, reached.config.questions), tokenizer)
        prompts = list(dict.fromkeys(prompt + target.answer_prefix for prompt, _ in pairs))
        if len(prompts) < 2:
            raise InapplicableError("the target has only one question, so that no batch can be made")
        lengths = [len(tokenizer(p)["input_ids"]) if callable(tokenizer) else len(p) for p in prompts]
        prompts, lengths = _chosen(prompts, lengths)
        compared = _by_guard if target.generate is None else _by_target
        with forwards.evaluating(model):
            repeated = _repeated(reached, prompts)
            record = compared(
                reached, prompts, prompts=len(prompts), padded=sum(n < max(lengths) for n in lengths), repeated=repeated
            )
        return {"decoding": record}


def _chosen(prompts: list[str], lengths: list[int]) -> tuple[list[str], list[int]]:
    """Return the first prompts, with the shortest and the longest of all among them, in their order."""
    order = sorted(range(len(prompts)), key=lambda i: lengths[i])
    ends = list(dict.fromkeys((order[0], order[-1])))
    kept = sorted([*ends, *[i for i in range(len(prompts)) if i not in ends][: _PROMPTS - len(ends)]])
    return [prompts[i] for i in kept], [lengths[i] for i in kept]


def _repeated(reached: Reloaded, prompts: list[str]) -> bool:
    """Return whether one batch gives the same bits twice."""
    model, tokenizer = reached.reloaded_model, reached.trainer.processing_class
    if callable(tokenizer):
        batch = generation.tokenized(model, tokenizer, reached.target, prompts)
    else:
        batch = {k: v for k, v in reached.batches[0].items() if k in ("input_ids", "attention_mask")}
    first, second = (model(**batch).logits for _ in range(2))
    return bool(torch.equal(first.nan_to_num(), second.nan_to_num()))


def _by_guard(reached: Reloaded, asked: list[str], **counts: Any) -> DecodingRecord:
    """Compare ids and scores of greedy generation, padded on the left, in float32 where the model can be widened."""
    with forwards.widened(reached.reloaded_model, reached.mode) as arithmetic:
        return _in_type(reached, asked, arithmetic, **counts)


def _in_type(reached: Reloaded, asked: list[str], arithmetic: str, **counts: Any) -> DecodingRecord:
    model, tokenizer = reached.reloaded_model, reached.trainer.processing_class
    model.eval()

    def decoded(prompts: list[str]) -> tuple[Tensor, list[Tensor]]:
        output, width = generation.generated(
            model,
            tokenizer,
            reached.target,
            prompts,
            max_new_tokens=_NEW_TOKENS,
            return_dict_in_generate=True,
            output_logits=True,
        )
        return output.sequences[:, width:], list(output.logits)

    with _watched_padding(model, tokenizer) as padding:
        together, scores = decoded(asked)
    ends = _ends(model)
    differences, largest = [], 0.0
    for i, prompt in enumerate(asked):
        alone, own_scores = decoded([prompt])
        parts = _part(alone[0].tolist(), together[i].tolist(), ends)
        steps = min(len(own_scores), len(scores)) if parts is None else parts + 1
        # tokens after the end of an answer do not belong to it
        steps = min(steps, _length(alone[0].tolist(), ends))
        for step in range(steps):
            change = forwards.distance(scores[step][i], own_scores[step][0]).item()
            largest = change if not change <= largest else largest
        if parts is not None:
            texts = [tokenizer.decode(ids, skip_special_tokens=True)[:200] for ids in (alone[0], together[i])]
            margin = _margin(own_scores[parts][0])
            differences.append(
                DifferenceRecord(prompt=prompt, position=parts, margin=margin, alone=texts[0], batched=texts[1])
            )
    counts |= padding
    return DecodingRecord(arithmetic=arithmetic, differences=tuple(differences), max_change=largest, **counts)


def _by_target(reached: Reloaded, asked: list[str], **counts: Any) -> DecodingRecord:
    """Compare texts of the target's own `generate`."""
    model, tokenizer, target = reached.reloaded_model, reached.trainer.processing_class, reached.target
    with _watched_padding(model, tokenizer) as padding:
        together = target.texts(model, tokenizer, asked)
    counts |= padding
    differences = []
    for prompt, batched in zip(asked, together, strict=True):
        with generation.watched(model, best=True) as scores:
            (alone,) = target.texts(model, tokenizer, [prompt])
        if alone != batched:
            differences.append(
                DifferenceRecord(
                    prompt=prompt,
                    position=sum(1 for _ in takewhile(lambda two: two[0] == two[1], zip(alone, batched, strict=False))),
                    alone=alone[:200],
                    batched=batched[:200],
                    margin=_margin_of_texts(tokenizer, scores, alone, batched),
                )
            )
    return DecodingRecord(arithmetic=reached.mode.compute_dtype, own=True, differences=tuple(differences), **counts)


@contextlib.contextmanager
def _watched_padding(model: Any, tokenizer: Any) -> Iterator[dict[str, int]]:
    """Yield a dict that receives `right_padded` and `unmasked` of the first batch that the model is given."""
    found: dict[str, int] = {}
    pad = getattr(tokenizer, "pad_token_id", None)

    def look(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        ids, mask = kwargs.get("input_ids", args[0] if args else None), kwargs.get("attention_mask")
        if found or not (isinstance(ids, Tensor) and ids.ndim == 2 and len(ids) > 1 and ids.shape[1] > 1):
            return
        hidden = torch.zeros_like(ids, dtype=torch.bool)
        if isinstance(mask, Tensor) and mask.shape == ids.shape:
            hidden = mask == 0
        padding = hidden if pad is None else hidden | (ids == pad)
        # padding is at the ends of a row; the same id within a prompt is a token
        front, behind = (~padding).int().cumsum(-1) == 0, (~padding).flip(-1).int().cumsum(-1).flip(-1) == 0
        found["right_padded"] = int(behind.any(-1).sum())
        found["unmasked"] = int(((front | behind) & ~hidden).sum())

    # peft's wrapper does not call itself
    hook = forwards.inner(model).register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield found
    finally:
        hook.remove()


def _ends(model: Any) -> set[int]:
    end = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return {e for e in (end if isinstance(end, (list, tuple)) else [end]) if e is not None}


def _length(ids: Sequence[int], ends: set[int]) -> int:
    """Return how many of the generated `ids` belong to the answer, its end token included."""
    return next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))


def _part(one: list[int], other: list[int], ends: set[int]) -> int | None:
    """Return the first place at which two answers differ; None where they do not."""
    one, other = one[: _length(one, ends)], other[: _length(other, ends)]
    for i, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return i
    return None if len(one) == len(other) else min(len(one), len(other)) - 1


def _margin(scores: Tensor) -> float | None:
    """Return the distance of the two best scores over the largest absolute one; None where they are not finite."""
    best = scores.float().topk(2).values
    finite = scores.float()[scores.isfinite()]
    if not best.isfinite().all():
        return None
    return float((best[0] - best[1]) / finite.abs().max().clamp_min(1e-20))


def _margin_of_texts(tokenizer: Any, scores: Any, alone: str, batched: str) -> float | None:
    """Return the margin at the first token that differs; None where `alone` was not decoded greedily."""
    best = scores.best or []
    ids = [int(indices[0]) for indices, _, _ in best]
    if not ids or not hasattr(tokenizer, "decode"):
        return None
    if not tokenizer.decode(ids, skip_special_tokens=True).strip().startswith(alone.strip()):
        return None
    for place in range(len(ids)):
        if not batched.strip().startswith(tokenizer.decode(ids[: place + 1], skip_special_tokens=True).strip()):
            break
    else:
        place = len(ids) - 1
    _, values, largest = best[place]
    margin = float((values[0] - values[-1]) / largest.clamp_min(1e-20))
    return margin if margin == margin else None
