"""What was seen of the evaluation set, before any filter."""

from __future__ import annotations

from dataclasses import dataclass

from pytest_sftguard.records.names import NONE, Names


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord:
    """The losses of evaluation batches, raw: those of the training's own evaluations, and of a pass after it."""

    batches: int
    """Batches whose loss was looked at after the training."""
    batches_in_training: int = 0
    """Batches whose loss was looked at while the training evaluated."""
    nonfinite: int = 0
    """How many of both had a loss that is not finite."""
    first_nonfinite: str = ""
    """The first of them."""
    without_loss: int = 0
    """Batches after the training for which the Trainer gave no loss."""
    rows: int = 0
    """Rows of those batches that have labels at all, supervised or not."""
    unlabelled: int = 0
    """Rows without one supervised token."""
    nonfinite_losses: Names = NONE
    """Losses of evaluations in the Trainer's own state that are not finite."""
    never_finite: Names = NONE
    """Metrics of the training's evaluations that were not finite once."""
    best_metric_finite: bool = True
    """Whether the best metric in the Trainer's state is a finite number, or there is none."""
