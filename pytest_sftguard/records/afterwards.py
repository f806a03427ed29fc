"""What was seen after the training, beside the round trip: the parser, the base's answers, the merged model."""

from __future__ import annotations

from dataclasses import dataclass

from pytest_sftguard.records.names import NONE, Names
from pytest_sftguard.records.results import AnswerRecord


@dataclass(frozen=True, kw_only=True)
class ParserRecord:
    """How the target's own `parse_answer` takes texts that hold no answer, or one written in another way."""

    tried: int
    """Texts that it was given."""
    junk: Names = NONE
    """Texts without an answer that it read a number in, as `'text' as 0.0`."""
    misread: Names = NONE
    """Texts with a number that it read another number in, as `'1,234' as 234.0`."""
    raised: Names = NONE
    """Texts that it raised at, as `'text': ValueError`."""


@dataclass(frozen=True, kw_only=True)
class BaseAnswersRecord:
    """The same questions, answered by the base alone; and what the rows taught of them."""

    answers: tuple[AnswerRecord, ...]
    """The base's answers, in the order of the questions."""
    taught: int
    """Questions that were found in the rows that were trained on."""
    rows: int
    """Rows that were looked through."""
    ends_taught: int | None = None
    """Those of the rows whose supervised tokens hold an end token; None where generation knows no end token."""
    loss: float | None = None
    """Mean loss of the base on the first micro-batches that were trained on; None where it has none of its own."""


@dataclass(frozen=True, kw_only=True)
class MergeRecord:
    """The adapter merged into its base."""

    layers: int
    """Layers that were merged."""
    dtype: str
    """The narrowest type that their weights are stored in, a torch dtype name."""
    max_abs_logit: float | None = None
    """Largest absolute logit of the model with its adapter beside it, on the probe batch."""
    max_logit_change: float | None = None
    """Largest absolute difference that merging made to a logit."""
    max_saved_change: float | None = None
    """The same after the merged model was saved and loaded again; None where that was not done."""
    not_saved: str = ""
    """Why the merged model was not saved and loaded; empty where it was."""
    swallowed: float | None = None
    """Share of the weights that merging left as they were, though the adapter would change them."""
    kept: float | None = None
    """Share of the adapter's change of the weights that is in the merged ones: 1 is all of it, 0 none."""
    least_kept: Names = NONE
    """The layer that kept least of it."""
    touched: Names = NONE
    """Tensors that merging changed though the adapter does not target them."""
