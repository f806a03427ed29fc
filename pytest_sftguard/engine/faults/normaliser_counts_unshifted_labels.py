"""The number of labels is counted before the shift, which drops the first of each row."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_sftguard.engine.faults import Fault
from pytest_sftguard.engine.faults._collating import collating

if TYPE_CHECKING:
    from transformers import Trainer


class NormaliserCountsUnshiftedLabels(Fault):
    """The loss is divided by one label per row too many."""

    id = "normaliser-counts-unshifted-labels"
    source = "https://github.com/huggingface/transformers/pull/46204"
    injects = "a label at the first position of each row, counted in num_items_in_batch"
    reported_by: ClassVar = ("batch_split_equivalence",)
    mechanism = "normaliser_counts_unshifted_labels"
    batch = (2, 2)

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """Supervise the first token, and count it."""
        trainer = build(**arguments)
        trainer._loss_shifts_labels = False

        def first(batch: Any) -> None:
            batch["labels"][:, 0] = batch["input_ids"][:, 0]

        return collating(trainer, first)
