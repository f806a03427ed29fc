"""The answers against the model's own scores: greedy generation takes the token with the best one at each place."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationMixin,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from pytest_sftguard.engine.after import forwards, generation
from pytest_sftguard.engine.looks import InapplicableError, Look
from pytest_sftguard.engine.looks.supervision import require_causal_model
from pytest_sftguard.engine.stages import Reloaded
from pytest_sftguard.records import FollowingRecord

_OTHER_SEARCHES = (
    "num_beams",
    "num_beam_groups",
    "penalty_alpha",
    "dola_layers",
    "guidance_scale",
    "constraints",
    "force_words_ids",
    "encoder_repetition_penalty",
    "encoder_no_repeat_ngram_size",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "exponential_decay_length_penalty",
    "remove_invalid_values",
    "watermarking_config",
    "token_healing",
    "prompt_lookup_num_tokens",
    "stop_strings",
)
"""Settings of a generation_config that make another search of it, or change scores in a form that is not repeated."""
_METHODS = ("generate", "_sample", "_get_logits_processor")
_CHANGING = ("dynamic", "longrope")
"""Rotary frequencies that follow the length: a longer sequence then has other scores at its earlier places."""


class Following(Look[Reloaded]):
    """Passes each prompt with its answer through the model once, and compares each token with the best one."""

    def conclude(self, reached: Reloaded) -> dict[str, Any]:
        """Compare the answers that the run has asked for anyway."""
        if reached.target.generate is not None:
            raise InapplicableError("the target answers with a generate of its own, which need not be greedy")
        if not reached.answered:
            raise InapplicableError("no question was answered")
        [(prompts, output)] = reached.answered[-1:]
        model, tokenizer = reached.reloaded_model, reached.trainer.processing_class
        arithmetic = require_greedy(reached)
        batch = generation.tokenized(model, tokenizer, reached.target, prompts)
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        with forwards.evaluating(model):
            return {"following": Followed(model, tokenizer, mask, output).record(arithmetic)}


def require_greedy(reached: Reloaded) -> str:
    """Type in which the model computes. Raises InapplicableError where its class or settings search otherwise."""
    model = reached.reloaded_model
    _require_plain_search(model)
    arithmetic = forwards.arithmetic(reached.mode)
    if arithmetic != "float32" and forwards.has_experts(model):
        raise InapplicableError(f"rounding in {arithmetic} changes which expert is chosen, and so the scores")
    return arithmetic


def _require_plain_search(model: Any) -> None:
    require_causal_model(model)
    plain = forwards.inner(model)
    config, settings = plain.config, getattr(plain, "generation_config", None)
    if not isinstance(plain, GenerationMixin) or settings is None:
        raise InapplicableError(f"{type(plain).__name__} does not generate as transformers does")
    if any(getattr(type(plain), name) is not getattr(GenerationMixin, name) for name in _METHODS):
        raise InapplicableError(f"{type(plain).__name__} has a generation of its own class")
    if getattr(config, "is_encoder_decoder", False):
        raise InapplicableError("an encoder-decoder is not passed through with its answer")
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if str(rope.get("rope_type", rope.get("type"))) in _CHANGING:
        raise InapplicableError("the model's rotary frequencies change with the length of the sequence")
    if others := [n for n in _OTHER_SEARCHES if _is_set(settings, n)]:
        raise InapplicableError(f"the generation_config sets {', '.join(others)}: that is no plain greedy search")


def _is_set(settings: Any, name: str) -> bool:
    value = getattr(settings, name, None)
    # 0 and 1 are tokens, and elsewhere what changes nothing
    neutral = () if name.endswith("_token_id") else (0, 1)
    return value is not None and not (isinstance(value, (int, float)) and value in neutral)


class Followed:
    """Prompts with their answers, in one batch and alone.

    `output` has the ids of both, of shape (rows, tokens), and `mask` is that of the prompts. `least` is the number of
    new tokens that generation was asked for at least, beside what the generation_config says.
    """

    def __init__(self, model: Any, tokenizer: Any, mask: Tensor, output: Tensor, least: int = 0) -> None:
        self.least = least
        self.model, self.tokenizer, self.mask, self.output = model, tokenizer, mask, output
        self.width = mask.shape[1]
        ends = generation.end_tokens(model, None)
        self.answers = [_answer(row, ends) for row in output[:, self.width :].tolist()]

    def record(self, arithmetic: str) -> FollowingRecord:
        """The token that is farthest below the best one; padding may move it there only if it is there without, too."""
        longest = max(map(len, self.answers))
        scores = self._scores(self.output[:, : self.width + longest], self.mask, longest)
        tokens, other, unscored = sum(map(len, self.answers)), 0, 0
        worst: tuple[float, int, int] | None = None
        for row, answer in enumerate(self.answers):
            found = [_below(scores[i][row], token) for i, token in enumerate(answer)]
            unscored += sum(b is None for b in found)
            if any(b for b in found):
                found = self._alone(row, found)
            for place, below in enumerate(found):
                if below:
                    other += 1
                    worst = max(worst or (0.0, 0, 0), (below, row, place))
        record = FollowingRecord(
            arithmetic=arithmetic, answers=len(self.answers), tokens=tokens, other=other, unscored=unscored
        )
        return record if worst is None else self._with(record, *worst)

    def _with(self, record: FollowingRecord, below: float, row: int, place: int) -> FollowingRecord:
        best = int(self._alone_scores(row)[place].argmax())
        prompt = self.output[row, : self.width][self.mask[row].bool()].tolist()
        return dataclasses.replace(
            record,
            below=below if math.isfinite(below) else None,
            prompt=self._text(prompt)[-200:],
            place=place + 1,
            token=self._text([self.answers[row][place]])[:40],
            best=self._text([best])[:40],
        )

    def _text(self, ids: list[int]) -> str:
        """The text of `ids`, or the ids themselves where the training has no tokenizer."""
        if hasattr(self.tokenizer, "decode"):
            return str(self.tokenizer.decode(ids))
        return " ".join(map(str, ids))

    def _alone(self, row: int, found: list[float | None]) -> list[float | None]:
        """The smaller distance of the two at each place: of the batch, and of the row without padding."""
        alone = [_below(s, t) for s, t in zip(self._alone_scores(row), self.answers[row], strict=True)]
        return [None if a is None or b is None else min(a, b) for a, b in zip(alone, found, strict=True)]

    def _alone_scores(self, row: int) -> list[Tensor]:
        kept = self.mask[row].bool()
        prompt, answer = self.output[row, : self.width][kept], self.output[row, self.width :]
        ids = torch.cat([prompt, answer[: len(self.answers[row])]])[None]
        mask = torch.ones_like(prompt)[None]
        return [s[0] for s in self._scores(ids, mask, len(self.answers[row]))]

    def _scores(self, ids: Tensor, mask: Tensor, new: int) -> list[Tensor]:
        """Scores of each of the `new` last tokens of `ids`, (rows, vocabulary), as generation processes them."""
        given: dict[str, Any] = {"input_ids": ids}
        given["attention_mask"] = torch.cat([mask, mask.new_ones(len(mask), ids.shape[1] - mask.shape[1])], 1)
        accepted = forwards.accepts(self.model)
        if "position_ids" in accepted and not _learns_a_prompt(self.model):
            given["position_ids"] = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)
        if "logits_to_keep" in accepted:
            given["logits_to_keep"] = new + 1
        logits = self.model(**given).logits[:, -(new + 1) : -1]
        start = ids.shape[1] - new
        processors = _processors(forwards.inner(self.model).generation_config, start, ids.device, self.least)
        return [processors(ids[:, : start + i], logits[:, i].float()) for i in range(new)]


def _processors(settings: Any, start: int, device: Any, least: int) -> LogitsProcessorList:
    """What changes scores in greedy search with these settings, for answers that start at the place `start`."""
    ends = settings.eos_token_id
    made = LogitsProcessorList()
    if settings.sequence_bias is not None:
        made.append(SequenceBiasLogitsProcessor(settings.sequence_bias))
    if settings.repetition_penalty not in (None, 1.0):
        made.append(RepetitionPenaltyLogitsProcessor(float(settings.repetition_penalty)))
    if settings.no_repeat_ngram_size:
        made.append(NoRepeatNGramLogitsProcessor(settings.no_repeat_ngram_size))
    if settings.bad_words_ids is not None:
        made.append(NoBadWordsLogitsProcessor(settings.bad_words_ids, ends))
    if settings.min_length and ends is not None:
        made.append(MinLengthLogitsProcessor(settings.min_length, ends, device=device))
    if (least := least or settings.min_new_tokens or 0) and ends is not None:
        made.append(MinNewTokensLengthLogitsProcessor(start, least, ends, device=device))
    if settings.suppress_tokens is not None:
        made.append(SuppressTokensLogitsProcessor(settings.suppress_tokens, device=device))
    if settings.begin_suppress_tokens is not None:
        made.append(SuppressTokensAtBeginLogitsProcessor(settings.begin_suppress_tokens, start, device=device))
    return made


def _learns_a_prompt(model: Any) -> bool:
    """Whether an adapter puts learned tokens in front, which have places of their own."""
    return bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))


def _answer(ids: list[int], ends: set[int]) -> list[int]:
    """The generated `ids` up to the end token; padding follows it."""
    end = next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))
    return ids[:end]


def _below(scores: Tensor, token: int) -> float | None:
    """How far the score of `token` is below the best, relative to the largest; None where the best is not finite."""
    best = scores.max()
    finite = scores[scores.isfinite()]
    if not best.isfinite() or scores.isnan().any():
        return None
    return float((best - scores[token]) / finite.abs().max().clamp_min(1e-20))
