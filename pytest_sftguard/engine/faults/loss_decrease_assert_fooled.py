"""The last loss is below the first one, and nothing was trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_sftguard.engine.faults import Fault

if TYPE_CHECKING:
    from transformers import Trainer


class LossDecreaseAssertFooled(Fault):
    """A learning rate of 0: the loss goes up and down with the batches."""

    id = "loss-decrease-assert-fooled"
    source = "https://github.com/huggingface/trl/issues/6702"
    injects = "learning_rate=0, shuffled batches"
    reported_by: ClassVar = ("lr_trace", "effective_steps", "every_factor_moves")
    mechanism = "learning_rate_zero"
    arguments: ClassVar = {"learning_rate": 0.0}

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """The arguments alone make it, wherever they are set."""
        return build(**arguments | {"learning_rate": 0.0})
