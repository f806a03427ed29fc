"""Fewer rows than a batch and drop_last: not one step, no exception, every check of a list is true."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from torch.utils.data import IterableDataset, Subset

from pytest_sftguard.engine.faults import Fault

if TYPE_CHECKING:
    from transformers import Trainer


class VacuousEvidence(Fault):
    """The training ends before it began."""

    id = "vacuous-evidence"
    source = "https://github.com/huggingface/sentence-transformers/issues/3145"
    injects = "one row less than a batch, dataloader_drop_last=True"
    reported_by: ClassVar = ("evidence_complete",)
    mechanism = "no_step_taken"

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """Leave too few rows."""
        trainer = build(**arguments)
        trainer.args.dataloader_drop_last = True
        rows = trainer.train_dataset
        kept = range(trainer.args.per_device_train_batch_size - 1)
        trainer.train_dataset = _Few(rows) if isinstance(rows, IterableDataset) else Subset(rows, kept)
        return trainer


class _Few(IterableDataset[Any]):
    """A stream without a row."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        return iter(())
