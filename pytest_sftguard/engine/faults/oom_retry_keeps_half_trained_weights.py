"""After running out of memory the Trainer begins again with a smaller batch, and with half-trained weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from pytest_sftguard.engine.faults import Fault

if TYPE_CHECKING:
    from transformers import Trainer


class OomRetryKeepsHalfTrainedWeights(Fault):
    """auto_find_batch_size puts counters and log back, and nothing else."""

    id = "oom-retry-keeps-half-trained-weights"
    source = "https://github.com/sentence-transformers/sentence-transformers/issues/3145"
    injects = "auto_find_batch_size=True, and torch.OutOfMemoryError in the third compute_loss of the process"
    reported_by: ClassVar = ("evidence_complete", "rerun_bit_equal")
    mechanism = "retry_keeps_trained_weights"
    batch = (8, 1)
    arguments: ClassVar = {"auto_find_batch_size": True}
    looks: ClassVar = ("rerun",)

    def __init__(self) -> None:
        self.calls = 0

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """Run out of memory once, as when another process takes some for a moment."""
        trainer = build(**arguments)
        original = trainer.compute_loss

        @functools.wraps(original)
        def crowded(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls == 3:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return original(*args, **kwargs)

        trainer.compute_loss = crowded
        return trainer
