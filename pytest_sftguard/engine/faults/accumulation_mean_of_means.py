"""Gradient accumulation averages the means of micro-batches instead of tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_sftguard.engine.faults import Fault
from pytest_sftguard.engine.faults._collating import uneven

if TYPE_CHECKING:
    from transformers import Trainer


class AccumulationMeanOfMeans(Fault):
    """Short micro-batches weigh as much as long ones."""

    id = "accumulation-mean-of-means"
    source = "https://github.com/huggingface/transformers/pull/34191"
    injects = "compute_loss without num_items_in_batch, on rows of uneven length"
    reported_by: ClassVar = ("batch_split_equivalence",)
    mechanism = "accumulation_mean_of_means"
    batch = (2, 4)

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """Leave out the number of tokens that the whole step has."""
        trainer = uneven(build(**arguments))
        original = trainer.compute_loss

        def compute_loss(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            return original(model, inputs, *args, **kwargs | {"num_items_in_batch": None})

        trainer.compute_loss = compute_loss
        trainer.loss_is_scaled_for_ga = False
        return trainer
