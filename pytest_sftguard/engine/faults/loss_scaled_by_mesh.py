"""The loss is multiplied by the number of processes once too often."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_sftguard.engine.faults import Fault

if TYPE_CHECKING:
    from transformers import Trainer


class LossScaledByMesh(Fault):
    """The compensation counts processes that share the data."""

    id = "loss-scaled-by-mesh"
    source = "https://github.com/huggingface/transformers/issues/39648"
    injects = "loss * num_processes in compute_loss"
    reported_by: ClassVar = ("replica_equivalence",)
    mechanism = "replicas_average_means"
    looks: ClassVar = ("replicas",)

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """Compensate twice."""
        trainer = build(**arguments)
        original = trainer.compute_loss

        def compute_loss(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            count = trainer.accelerator.num_processes
            return (result[0] * count, *result[1:]) if isinstance(result, tuple) else result * count

        trainer.compute_loss = compute_loss
        return trainer
