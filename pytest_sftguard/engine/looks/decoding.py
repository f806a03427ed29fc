"""The same prompts in one batch and one by one: a greedy answer must not depend on who is asked beside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pytest_sftguard.engine.after import forwards, generation
from pytest_sftguard.engine.looks import InapplicableError, Look, Scene
from pytest_sftguard.records import DecodingRecord, DifferenceRecord

_PROMPTS = 8
_CANDIDATES = 64
"""Questions of which the longest and the shortest are taken, so that a batch pads something."""
_NEW_TOKENS = 16


class Decoding(Look):
    """Lets the reloaded adapter answer in a batch and alone, in the guard's way or the target's own."""

    needs = "reloaded"

    def conclude(self, scene: Scene) -> dict[str, Any]:
        """Answer both ways, and run one batch twice."""
        assert scene.trainer is not None
        tokenizer, model = scene.trainer.processing_class, scene.reloaded
        if not scene.config.questions or scene.target.questions is None:
            raise InapplicableError("the target offers no questions()")
        pairs = scene.target.pairs(max(_CANDIDATES, scene.config.questions), tokenizer)
        prompts = list(dict.fromkeys(prompt + scene.target.answer_prefix for prompt, _ in pairs))
        if len(prompts) < 2:
            raise InapplicableError("the target has one question alone, so that no batch can be made")
        lengths = [len(tokenizer(p)["input_ids"]) if callable(tokenizer) else len(p) for p in prompts]
        prompts, lengths = _chosen(prompts, lengths)
        padded = sum(n < max(lengths) for n in lengths)
        assert model is not None
        with forwards.evaluating(model):
            repeated = _repeated(model, scene, tokenizer, prompts)
            found = _by_target if scene.target.generate is not None else _by_guard
            record = found(model, scene, tokenizer, prompts, padded)
        return {"decoding": record(repeated)}


def _chosen(prompts: list[str], lengths: list[int]) -> tuple[list[str], list[int]]:
    """The first prompts, with the shortest and the longest of all among them, in their order."""
    order = sorted(range(len(prompts)), key=lambda i: lengths[i])
    ends = list(dict.fromkeys((order[0], order[-1])))
    kept = sorted([*ends, *[i for i in range(len(prompts)) if i not in ends][: _PROMPTS - len(ends)]])
    return [prompts[i] for i in kept], [lengths[i] for i in kept]


def _repeated(model: Any, scene: Scene, tokenizer: Any, prompts: list[str]) -> bool:
    """Whether one batch gives the same bits twice."""
    if callable(tokenizer):
        batch = generation.tokenized(model, tokenizer, scene.target, prompts)
    else:
        assert scene.watch is not None
        batch = {k: v for k, v in scene.watch.batches[0].items() if k in ("input_ids", "attention_mask")}
    first, second = (model(**batch).logits for _ in range(2))
    return bool(torch.equal(first.nan_to_num(), second.nan_to_num()))


def _by_guard(model: Any, scene: Scene, tokenizer: Any, prompts: list[str], padded: int) -> Any:
    """Ids and scores of the guard's own way: greedy, padded on the left."""
    model, arithmetic = forwards.widened(model, scene.mode)
    model.eval()

    def decoded(asked: list[str]) -> tuple[Tensor, list[Tensor]]:
        output, width = generation.generated(
            model, tokenizer, scene.target, asked,
            max_new_tokens=_NEW_TOKENS, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        return output.sequences[:, width:], list(output.logits)

    together, scores = decoded(prompts)
    differences, largest = [], 0.0
    for i, prompt in enumerate(prompts):
        alone, own_scores = decoded([prompt])
        parts = _part(alone[0].tolist(), together[i].tolist(), _ends(model))
        steps = min(len(own_scores), len(scores)) if parts is None else parts + 1
        # what follows the end of an answer is no answer
        steps = min(steps, _length(alone[0].tolist(), _ends(model)))
        for step in range(steps):
            change = forwards.distance(scores[step][i], own_scores[step][0]).item()
            largest = change if not change <= largest else largest
        if parts is not None:
            differences.append(
                DifferenceRecord(
                    prompt=prompt, position=parts, margin=_margin(own_scores[parts][0]),
                    alone=tokenizer.decode(alone[0], skip_special_tokens=True)[:200],
                    batched=tokenizer.decode(together[i], skip_special_tokens=True)[:200],
                )
            )  # fmt: skip
    return lambda repeated: DecodingRecord(
        arithmetic=arithmetic, prompts=len(prompts), padded=padded, differences=tuple(differences),
        max_change=largest, repeated=repeated,
    )  # fmt: skip


def _by_target(model: Any, scene: Scene, tokenizer: Any, prompts: list[str], padded: int) -> Any:
    """Texts of the target's own `generate`, whatever it does."""
    together = scene.target.texts(model, tokenizer, prompts)
    differences = []
    for prompt, batched in zip(prompts, together, strict=True):
        with generation.watched(model, best=True) as scores:
            (alone,) = scene.target.texts(model, tokenizer, [prompt])
        if alone != batched:
            differences.append(
                DifferenceRecord(
                    prompt=prompt, position=_common(alone, batched), alone=alone[:200], batched=batched[:200],
                    margin=_margin_of_texts(tokenizer, scores, alone, batched),
                )
            )  # fmt: skip
    return lambda repeated: DecodingRecord(
        arithmetic=scene.mode.compute_dtype, prompts=len(prompts), own=True, padded=padded,
        differences=tuple(differences), repeated=repeated,
    )  # fmt: skip


def _ends(model: Any) -> set[int]:
    end = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return {e for e in (end if isinstance(end, (list, tuple)) else [end]) if e is not None}


def _length(ids: Sequence[int], ends: set[int]) -> int:
    """How many of the generated `ids` belong to the answer, its end included."""
    return next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))


def _part(one: list[int], other: list[int], ends: set[int]) -> int | None:
    """The first place at which two answers differ; None where they do not."""
    one, other = one[: _length(one, ends)], other[: _length(other, ends)]
    for i, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return i
    return None if len(one) == len(other) else min(len(one), len(other)) - 1


def _margin(scores: Tensor) -> float | None:
    """Distance of the two best scores, relative to the largest; None where they are not finite."""
    best = scores.float().topk(2).values
    finite = scores.float()[scores.isfinite()]
    if not best.isfinite().all():
        return None
    return float((best[0] - best[1]) / finite.abs().max().clamp_min(1e-20))


def _common(one: str, other: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _margin_of_texts(tokenizer: Any, scores: Any, alone: str, batched: str) -> float | None:
    """The margin at the token from which on two texts differ, where the one alone was decoded greedily and plainly."""
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
