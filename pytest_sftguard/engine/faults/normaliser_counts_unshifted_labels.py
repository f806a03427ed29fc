"""The loss is divided by labels that were counted before the shift: one too many for each row."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_sftguard.engine.faults import Fault
from pytest_sftguard.engine.faults._collating import collating

if TYPE_CHECKING:
    from transformers import Trainer


class NormaliserCountsUnshiftedLabels(Fault):
    """Rows are supervised from their first token on, which nothing predicts, and which is counted all the same."""

    id = "normaliser-counts-unshifted-labels"
    source = "https://github.com/huggingface/transformers/pull/46204"
    injects = "labels at the first position of each row, and num_items_in_batch counted over all labels"
    reported_by: ClassVar = ("batch_split_equivalence",)
    mechanism = "loss_divided_by_unshifted_labels"
    step = 1

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """Supervise the first position, and count as releases before May 2026 did."""
        trainer = collating(build(**arguments), _supervise_the_first)
        trainer._loss_shifts_labels = False
        return trainer


def _supervise_the_first(batch: Any) -> None:
    batch["labels"][:, 0] = batch["input_ids"][:, 0]
