"""The loss is multiplied by the number of processes once too often."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_sftguard.engine.faults import Fault

if TYPE_CHECKING:
    from transformers import Trainer


class LossScaledByMesh(Fault):
    """The factor that makes up for averaging over ranks counts ranks that share their data."""

    id = "loss-scaled-by-mesh"
    source = "https://github.com/huggingface/transformers/issues/39648"
    injects = "compute_loss multiplies by accelerator.num_processes once more"
    reported_by: ClassVar = ("replica_equivalence",)
    mechanism = "replicas_average_means"
    step = 1
    batch = (8, 1)
    looks: ClassVar = ("replicas",)

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """Multiply what compute_loss gives."""
        trainer = build(**arguments)
        original = trainer.compute_loss

        @functools.wraps(original)
        def scaled(*args: Any, **kwargs: Any) -> Any:
            result, factor = original(*args, **kwargs), trainer.accelerator.num_processes
            return (result[0] * factor, *result[1:]) if isinstance(result, tuple) else result * factor

        trainer.compute_loss = scaled
        return trainer
