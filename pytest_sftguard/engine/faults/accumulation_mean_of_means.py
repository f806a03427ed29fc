"""Gradient accumulation averages the micro-batches' means, where it should average over tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_sftguard.engine.faults import Fault
from pytest_sftguard.engine.faults._unevenly import unevenly

if TYPE_CHECKING:
    from transformers import Trainer


class AccumulationMeanOfMeans(Fault):
    """A compute_loss that knows nothing of num_items_in_batch, as before transformers 4.46."""

    id = "accumulation-mean-of-means"
    source = "https://github.com/huggingface/transformers/pull/34191"
    injects = "num_items_in_batch dropped, the loss of each micro-batch divided by their number"
    reported_by: ClassVar = ("batch_split_equivalence",)
    mechanism = "accumulation_mean_of_means"
    step = 1
    batch = (2, 4)

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """Forget how many labels the step has."""
        trainer = unevenly(build(**arguments))
        original = trainer.compute_loss

        @functools.wraps(original)
        def forgetful(model: Any, inputs: Any, *args: Any, num_items_in_batch: Any = None, **kwargs: Any) -> Any:
            return original(model, inputs, *args, **kwargs)

        trainer.compute_loss = forgetful
        trainer.loss_is_scaled_for_ga = False
        return trainer
