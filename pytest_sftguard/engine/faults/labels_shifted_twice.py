"""The caller shifts labels, the model shifts again: it learns token t+2."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_sftguard.engine.faults import Fault

if TYPE_CHECKING:
    from transformers import Trainer


class LabelsShiftedTwice(Fault):
    """The collated labels are one place further left than the inputs."""

    id = "labels-shifted-twice"
    source = "https://github.com/huggingface/transformers/issues/47394"
    injects = "labels = labels[1:] + [-100] in every collated batch"
    reported_by: ClassVar = ("supervision_audit", "answers_beat_base", "strict_answers")
    mechanism = "labels_shifted_twice"
    steps = 100
    asks = True

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """Shift what the collator gives."""
        trainer = build(**arguments)
        collate = trainer.data_collator

        def shifted(features: Any) -> Any:
            batch = collate(features)
            batch["labels"] = batch["labels"].roll(-1, dims=1)
            batch["labels"][:, -1] = -100
            return batch

        trainer.data_collator = shifted
        return trainer
