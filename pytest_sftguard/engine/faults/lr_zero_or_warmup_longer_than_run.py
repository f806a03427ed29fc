"""A warm-up that the run never leaves: the learning rate is 0 in all of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from torch.optim.lr_scheduler import LambdaLR

from pytest_sftguard.engine.faults import Fault

if TYPE_CHECKING:
    from transformers import Trainer


class LrZeroOrWarmupLongerThanRun(Fault):
    """A schedule whose integer division stays at 0 until its hundred steps of warm-up are over."""

    id = "lr-zero-or-warmup-longer-than-run"
    source = "https://github.com/huggingface/transformers/issues/33086"
    injects = "LambdaLR of min(1, step // 100)"
    reported_by: ClassVar = ("lr_trace", "effective_steps", "every_factor_moves")
    mechanism = "learning_rate_zero"

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """Put the schedule in the place of the Trainer's own."""
        trainer = build(**arguments)

        def create_scheduler(num_training_steps: int, optimizer: Any = None) -> Any:
            trainer.lr_scheduler = LambdaLR(optimizer or trainer.optimizer, lambda step: min(1, step // 100))
            return trainer.lr_scheduler

        trainer.create_scheduler = create_scheduler
        return trainer
