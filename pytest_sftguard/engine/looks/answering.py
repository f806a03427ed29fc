"""The target's own `generate`: what it gives the model, what the model returns there, and how it leaves the model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pytest_sftguard.engine.adapter import adapters, attachment
from pytest_sftguard.engine.after import forwards
from pytest_sftguard.engine.looks import InapplicableError, Look
from pytest_sftguard.engine.looks.supervision import require_causal_model
from pytest_sftguard.engine.stages import Reloaded
from pytest_sftguard.records import AnsweringRecord, Names

_PROMPTS = 4
"""Prompts that are answered: each costs a few forward passes."""
_ROWS = 8
"""Rows of the first forward passes that are compared."""
_FLOOR = 1e-4
"""Distance of scores that is no rounding of float32. Measured 4e-6."""


class Answering(Look[Reloaded]):
    """Watches `generate` of the target answer a few prompts, twice, with other random numbers."""

    def conclude(self, reached: Reloaded) -> dict[str, Any]:
        """Compare the first scores in `generate` with the adapter's own for the same tokens."""
        target, given, model = reached.target, reached.trainer.processing_class, reached.reloaded_model
        # a processor of images or sounds holds the tokenizer of its texts
        tokenizer = getattr(given, "tokenizer", given)
        if target.generate is None:
            raise InapplicableError("the target brings no generate(model, tokenizer, prompts) of its own")
        if not reached.config.questions or target.questions is None or not callable(tokenizer):
            raise InapplicableError("the target offers no questions() that its tokenizer could read")
        require_causal_model(model)
        pairs = target.pairs(reached.config.questions, given)
        prompts = list(dict.fromkeys(prompt + target.answer_prefix for prompt, _ in pairs))[:_PROMPTS]
        asked = [tokenizer(p)["input_ids"] for p in prompts]
        # `generate` has answered the questions by now, and may have left the model without its adapter
        sound = reached.trained_model if _lost_adapter(model, reached.trained_model) else model
        with forwards.evaluating(model), forwards.evaluating(sound):
            before = _last(sound, asked[0])
            with _watched(model) as seen:
                torch.manual_seed(0)
                texts = target.texts(model, given, prompts)
            left_training = any(m.training for _, m in forwards.dropouts(model))
            model.eval()
            left = float(forwards.distance(_last(model, asked[0]), before))
            torch.manual_seed(1)
            again = target.texts(model, given, prompts)
            model.eval()
            # what `generate` left behind is no adapter to compare with
            compared = _compared(model, seen.rows) if left <= _FLOOR or left != left else {}
        short = _truncated(asked, seen.rows, set(tokenizer.all_special_ids))
        return {
            "answering": AnsweringRecord(
                prompts=len(prompts),
                forwards=seen.forwards,
                truncated=len(short),
                truncated_example=short[0] if short else "",
                dropouts=Names.of(sorted(seen.dropouts)),
                left_training=left_training,
                left_change=left,
                resampled=sum(a != b for a, b in zip(texts, again, strict=True)),
                **compared,
            )
        }


@dataclass
class _Seen:
    """What was seen of one call of `generate`."""

    rows: list[tuple[tuple[int, ...], Tensor]] = field(default_factory=list)
    """Token ids of the first rows without padding, and the scores of the token after them."""
    forwards: int = 0
    """Number of forward passes."""
    dropouts: set[str] = field(default_factory=set)
    """Modules that dropped activations."""


@contextlib.contextmanager
def _watched(model: Any) -> Iterator[_Seen]:
    """Collect what the model is given whole, and the dropouts that are called in training mode."""
    seen = _Seen()

    def look(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        seen.forwards += 1
        given = forwards.given(model, args, kwargs)
        ids, logits = given.get("input_ids"), _logits(output)
        if not isinstance(ids, Tensor) or logits is None or ids.dim() != 2 or ids.shape[1] < 2:
            return
        if _length(given.get("past_key_values")) > ids.shape[1]:
            # a later part of a prompt that is read in parts
            seen.rows.clear()
            return
        seen.rows += _rows(ids, given.get("attention_mask"), logits, model)
        del seen.rows[_ROWS:]

    # a PeftModel calls the inner model's forward method, without its hooks; `generate` calls the inner model
    held = {id(m): m for m in (model, forwards.inner(model))}.values()
    hooks = [m.register_forward_hook(look, with_kwargs=True) for m in held]
    try:
        with forwards.dropping(model) as seen.dropouts:
            yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _logits(output: Any) -> Tensor | None:
    """The scores that the model returned, (batch, tokens, vocabulary); None where it returned something else."""
    try:
        found = forwards.main_output(output)
    # nothing may be raised within somebody's `generate`
    except (TypeError, ValueError):
        return None
    return found if found.dim() == 3 else None


def _lost_adapter(model: nn.Module, trained: nn.Module) -> bool:
    """Whether the adapter that `trained` has was disabled in `model`, or taken out of it."""
    if not attachment.tuner_layers(trained):
        return False
    layers = attachment.tuner_layers(model).values()
    return not layers or any(getattr(m, "disable_adapters", False) is True for m in layers)


def _length(cache: Any) -> int:
    """Number of tokens in a cache, those of the present forward pass included."""
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0


def _rows(ids: Tensor, mask: Any, logits: Tensor, model: Any) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """The rows without padding, each with the scores after its last token."""
    pad = getattr(getattr(forwards.inner(model), "config", None), "pad_token_id", None)
    known = isinstance(mask, Tensor) and mask.shape == ids.shape and not bool(mask.all())
    for i, row in enumerate(ids.tolist()[:_ROWS]):
        kept = [k for k, token in enumerate(row) if (mask[i, k] if known else token != pad)]
        if kept:
            # a prompt that was learned comes before the row; `generate` may compute the last scores alone
            before = logits.shape[1] - ids.shape[1]
            end = kept[-1] + before if before >= 0 else -1
            yield tuple(row[k] for k in kept), logits[i, end].detach().float().clone()


def _last(model: Any, ids: Sequence[int]) -> Tensor:
    """The scores of the token after `ids`, one row without padding."""
    row = torch.tensor([ids], device=next(model.parameters()).device)
    return forwards.main_output(model(input_ids=row, attention_mask=torch.ones_like(row)))[0, -1].float()


def _compared(model: Any, rows: list[tuple[tuple[int, ...], Tensor]]) -> dict[str, Any]:
    """Fields of the record: how far the scores in `generate` are from the adapter's own, and if they are the base's."""
    changes, as_base = [], 0
    for ids, scores in rows:
        own = float(forwards.distance(scores, _last(model, ids)))
        with adapters.disabled(model) if adapters.config_of(model) is not None else contextlib.nullcontext():
            base = float(forwards.distance(scores, _last(model, ids)))
        changes.append(own)
        # the measure is how near the base is, because a short training moves few scores far
        as_base += own > _FLOOR and base * 10 < own
    return {"compared": len(changes), "max_change": max(changes) if changes else None, "as_base": as_base}


def _truncated(asked: list[list[int]], rows: list[tuple[tuple[int, ...], Tensor]], special: set[int]) -> list[str]:
    """The prompts of which a row holds the beginning or the end alone, and no row all of it."""
    plain = [[i for i in ids if i not in special] for ids in asked]
    given = [[i for i in ids if i not in special] for ids, _ in rows]
    found = []
    for prompt in plain:
        if any(_holds(row, prompt) for row in given):
            continue
        parts = [row for row in given if row and len(row) < len(prompt)]
        parts = [row for row in parts if row in (prompt[: len(row)], prompt[-len(row) :])]
        if parts:
            found.append(f"{max(map(len, parts))} of {len(prompt)} tokens")
    return found


def _holds(row: list[int], part: list[int]) -> bool:
    return any(row[i : i + len(part)] == part for i in range(len(row) - len(part) + 1))
