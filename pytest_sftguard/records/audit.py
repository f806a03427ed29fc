"""What the rows of the training look like: their labels, and the prompts that come before them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DefectRecord:
    """One defect of rows."""

    name: str
    """What is wrong, such as `unsupervised`."""
    rows: int
    """Rows that have it; micro-batches, where it is a matter of those."""
    step: int | None = None
    """Optimizer step of the first micro-batch with such a row; None in the data set."""
    example: str = ""
    """One of them, shortened."""


@dataclass(frozen=True, kw_only=True)
class SupervisionRecord:
    """Labels held against the rows that they belong to, in micro-batches as trained on and in the data set."""

    trained_rows: int
    """Rows of the micro-batches that were looked at."""
    dataset_rows: int
    """Rows of the data set that were looked at; 0 where it holds no labels, or is a stream."""
    micro_batches: int
    """Micro-batches that were looked at."""
    asks: bool
    """Whether the target asks questions, so that prompts are known."""
    answered_rows: int = 0
    """Rows that hold one of the target's questions with its answer."""
    trained_defects: tuple[DefectRecord, ...] = ()
    """What is wrong in the micro-batches."""
    dataset_defects: tuple[DefectRecord, ...] = ()
    """What is wrong in the data set."""


@dataclass(frozen=True, kw_only=True)
class PromptsRecord:
    """What generation is given, held against the rows of the training."""

    questions: int
    """Prompts of the target that were looked at."""
    rows: int
    """Rows of the training that were looked at."""
    matched: int = 0
    """Rows that hold one of the questions, and were compared token for token."""
    deviating: int = 0
    """Matched rows that do not begin with the tokens that generation is given."""
    short: int = 0
    """Matched rows of which generation is given less than what stands before the first label."""
    forms: int = 0
    """Ends of the prompts, beginning and end, that were compared where no row matched."""
    strange_forms: int = 0
    """Those of them that differ."""
    example: str = ""
    """One of what deviates, with its tokens."""
