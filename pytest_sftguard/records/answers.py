"""Records of answers: those of the reloaded adapter and of the base, how they are parsed, and how they are decoded."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pytest_sftguard.records.tensors import NONE, Names


@dataclass(frozen=True, kw_only=True)
class AnswerRecord:
    """One answer, generated greedily."""

    prompt: str
    """Input of the model."""
    text: str
    """The generated text, with the seeded prefix."""
    expected: float
    """The right number."""
    parsed: float | None = None
    """The number that the target's `parse_answer` read; None if it read none."""
    stopped: bool | None = None
    """Whether an end token was generated within the budget; None if generation has no end token."""

    @property
    def is_number(self) -> bool:
        """Whether a finite number was read."""
        return self.parsed is not None and math.isfinite(self.parsed)

    def is_right(self, rtol: float) -> bool:
        """Whether the parsed number is the expected one, within a share of it."""
        return self.parsed is not None and abs(self.parsed - self.expected) <= rtol * abs(self.expected)


@dataclass(frozen=True, kw_only=True)
class ParserRecord:
    """What the target's own `parse_answer` reads in texts without an answer, and in answers written differently."""

    tried: int
    """Number of texts that it was given."""
    junk: Names = NONE
    """Texts without an answer in which it read a number, as `'text' as 0.0`."""
    misread: Names = NONE
    """Texts with a number in which it read another number, as `'1,234' as 234.0`."""
    raised: Names = NONE
    """Texts on which it raised, as `'text': ValueError`."""


@dataclass(frozen=True, kw_only=True)
class BaseAnswersRecord:
    """The base's own answers to the same questions, and how many of these the training's rows teach."""

    answers: tuple[AnswerRecord, ...]
    """The base's answers, in the order of the questions."""
    taught: int
    """Number of questions found in the rows that were trained on."""
    rows: int
    """Number of rows that were searched."""
    ends_taught: int | None = None
    """Number of those rows with an end token among their supervised tokens; None if generation has no end token."""
    loss: float | None = None
    """Mean loss of the base on the first micro-batches that were trained on; None if it has no loss of its own."""


@dataclass(frozen=True, kw_only=True)
class GenerationRecord:
    """The next-token scores from which answers were decoded."""

    prompts: int
    """Number of prompts."""
    own: bool = False
    """Whether the target's own `generate` answered them."""
    forwards: int = 0
    """Number of the model's forward passes that were seen."""
    scores: int = 0
    """Number of rows of next-token scores in them: one for each prompt and generated token."""
    nonfinite: int = 0
    """Number of rows that contain NaN or infinity."""
    first_nonfinite: int | None = None
    """The first forward pass with such a row, from 1; None if there is none."""
    zero_ids: int = 0
    """Number of answers that repeat the token id 0, as which greedy decoding reads NaN."""


@dataclass(frozen=True, kw_only=True)
class FollowingRecord:
    """Answers, token by token, against the scores of one forward pass over prompt and answer."""

    arithmetic: str
    """Type in which the scores were computed: `float32`, `tf32`, `bfloat16` or `float16`."""
    answers: int
    """Number of answers."""
    tokens: int
    """Number of their tokens, end tokens included."""
    other: int = 0
    """Number of tokens that had not the best score, both in the batch and without padding."""
    unscored: int = 0
    """Number of tokens whose scores were not finite."""
    below: float | None = None
    """Largest distance of such a token below the best one, relative to the largest score; None if all had the best,
    or if the generation_config rules the token out."""
    prompt: str = ""
    """End of the prompt of that token."""
    place: int = 0
    """Its place in the answer, from 1."""
    token: str = ""
    """Its text."""
    best: str = ""
    """Text of the token with the best score there."""


@dataclass(frozen=True, kw_only=True)
class DifferenceRecord:
    """A prompt whose answer in a batch is not its answer alone."""

    prompt: str
    """The prompt."""
    position: int
    """First generated token that differs, from 0; in characters if only the texts are known."""
    margin: float | None = None
    """Distance of the two best scores there, relative to the largest score; None if it is not known."""
    alone: str = ""
    """The answer alone."""
    batched: str = ""
    """The answer in the batch."""


@dataclass(frozen=True, kw_only=True)
class DecodingRecord:
    """The same prompts answered in one batch and one by one."""

    arithmetic: str
    """Type in which the scores were computed: `float32`, `tf32`, `bfloat16` or `float16`."""
    prompts: int
    """Number of prompts that were answered in both settings."""
    own: bool = False
    """Whether the target's own `generate` answered them."""
    padded: int = 0
    """Number of prompts that are shorter than the longest, so that the batch pads them."""
    differences: tuple[DifferenceRecord, ...] = ()
    """Answers that differ."""
    max_change: float | None = None
    """Largest distance between the centred scores of a token in the batch and alone, relative to their norm. None if
    the target's own `generate` answered, because it returns texts only."""
    repeated: bool = False
    """Whether two forward passes in evaluation mode gave the same bits."""
    right_padded: int | None = None
    """Number of prompts of the batch with padding behind them; None if the model's inputs were not seen."""
    unmasked: int | None = None
    """Number of the batch's padding tokens that its attention mask, or a missing one, lets others attend to."""


@dataclass(frozen=True, kw_only=True)
class AnsweringRecord:
    """What was seen of the target's own `generate`."""

    prompts: int
    """Number of prompts that it was given."""
    forwards: int = 0
    """Number of the model's forward passes in it."""
    compared: int = 0
    """Number of rows whose first scores were compared with the adapter's own for the same tokens."""
    max_change: float | None = None
    """Largest distance between those centred scores, relative to their norm; None if none were compared."""
    as_base: int = 0
    """Number of those rows whose scores are those of the model with its adapter disabled."""
    truncated: int = 0
    """Number of prompts of which the model was given a part alone."""
    truncated_example: str = ""
    """How much of one of them it was given."""
    dropouts: Names = NONE
    """Dropouts that were called in training mode."""
    left_training: bool = False
    """Whether a dropout was left in training mode."""
    left_change: float | None = None
    """Distance between the adapter's scores after one prompt, before and after the call."""
    resampled: int = 0
    """Number of answers that were others under another random seed."""
