"""What was seen of decoding: the scores of every generated token, and answers in a batch beside answers alone."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class GenerationRecord:
    """The next-token scores that answers were decoded from."""

    prompts: int
    """Prompts that were answered."""
    own: bool = False
    """Whether the target's own `generate` answered them."""
    forwards: int = 0
    """Forward passes of the model that were seen meanwhile."""
    scores: int = 0
    """Rows of next-token scores in them: one for each prompt and generated token."""
    nonfinite: int = 0
    """Rows that hold NaN or infinity."""
    first_nonfinite: int | None = None
    """The first forward pass with such a row, from 1; None where there is none."""
    zero_ids: int = 0
    """Answers that are the token id 0 over and over, as greedy decoding reads NaN."""


@dataclass(frozen=True, kw_only=True)
class DifferenceRecord:
    """A prompt that is answered otherwise in a batch than alone."""

    prompt: str
    """The prompt."""
    position: int
    """Generated token at which the answers part, from 0; in characters where only texts are known."""
    margin: float | None = None
    """Distance of the two best scores there, relative to the largest score; None where it is not known."""
    alone: str = ""
    """The answer alone."""
    batched: str = ""
    """The answer in the batch."""


@dataclass(frozen=True, kw_only=True)
class DecodingRecord:
    """The same prompts answered in one batch and one by one."""

    arithmetic: str
    """Type that the scores were computed in: `float32`, `tf32`, `bfloat16` or `float16`."""
    prompts: int
    """Prompts that were answered both ways."""
    own: bool = False
    """Whether the target's own `generate` answered them."""
    padded: int = 0
    """Prompts that are shorter than the longest, so that the batch pads them."""
    differences: tuple[DifferenceRecord, ...] = ()
    """Answers that differ."""
    max_change: float | None = None
    """Largest distance between the scores of a token in the batch and alone, relative to their norm; both centred.
    None where the target's own `generate` answered, which gives texts alone."""
    repeated: bool = False
    """Whether two forward passes in evaluation mode gave the same bits."""
