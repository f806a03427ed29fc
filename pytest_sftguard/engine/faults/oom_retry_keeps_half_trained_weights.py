"""After running out of memory the training begins again, counters and all, with the weights that it had."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_sftguard.engine.faults import Fault

if TYPE_CHECKING:
    from transformers import Trainer


class OomRetryKeepsHalfTrainedWeights(Fault):
    """The log looks like a clean run."""

    id = "oom-retry-keeps-half-trained-weights"
    source = "https://github.com/huggingface/sentence-transformers/issues/3145"
    injects = "OutOfMemoryError in the third micro-batch, auto_find_batch_size=True"
    reported_by: ClassVar = ("evidence_complete", "effective_steps")
    mechanism = "retry_keeps_trained_weights"
    arguments: ClassVar = {"auto_find_batch_size": True}

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """Run out of memory once."""
        import torch

        trainer = build(**arguments)
        original, calls = trainer.compute_loss, [0]

        def compute_loss(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] == 3:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return original(*args, **kwargs)

        trainer.compute_loss = compute_loss
        return trainer
