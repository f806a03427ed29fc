"""What was seen of rows alone and in company: padded, packed, and under another kernel of attention."""

from __future__ import annotations

from dataclasses import dataclass

from pytest_sftguard.records.names import NONE, Names


@dataclass(frozen=True, kw_only=True)
class ComparisonRecord:
    """The logits of rows in one setting, beside those of the same tokens alone and unpadded."""

    setting: str
    """How the rows were given: `as trained on`, `padded left`, `padded right`, `alone`."""
    attention: str
    """Implementation of attention that they ran under."""
    rows: int
    """Sequences that were compared."""
    packed: int = 0
    """How many of them are parts of packs."""
    nonfinite: int = 0
    """Tokens with a logit that is NaN or infinite, in the setting or alone."""
    max_change: float
    """Largest distance between the logits of a token, relative to their norm; both centred over the vocabulary."""
    where: str = ""
    """The row and the token that it was seen at."""


@dataclass(frozen=True, kw_only=True)
class ContextRecord:
    """Whether what the model says of a token depends on anything but the tokens before it in its row."""

    arithmetic: str
    """Type that the comparisons were computed in: `float32`, `tf32`, `bfloat16` or `float16`."""
    asked: int
    """Comparisons that were to be made."""
    comparisons: tuple[ComparisonRecord, ...] = ()
    """Those that were made."""
    left_out: str = ""
    """Why rows could not be compared at all; empty where they were."""
    overflowed: int = 0
    """Tokens with a logit that is not finite where the rows are given as trained on, in the training's arithmetic."""
    rotary: int = 0
    """Buffers of rotary frequencies."""
    low_rotary: Names = NONE
    """Those that are kept in half precision."""
    rotary_error: float = 0.0
    """Largest relative distance of a frequency from what the architecture computes."""
    masks: int = 0
    """Four-dimensional attention masks that the model was given."""
    blind_queries: int = 0
    """Rows of such masks that let a token see nothing at all, itself included."""
