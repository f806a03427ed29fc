"""The scheduler is stepped twice a step, and the learning rate is 0 half-way."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_sftguard.engine.faults import Fault

if TYPE_CHECKING:
    from transformers import Trainer


class ScheduleRunsNTimesTooFast(Fault):
    """As accelerate steps a prepared scheduler once for each process."""

    id = "schedule-runs-n-times-too-fast"
    source = "https://github.com/huggingface/accelerate/issues/1382"
    injects = "lr_scheduler.step calls itself twice, linear schedule"
    reported_by: ClassVar = ("lr_trace",)
    mechanism = "schedule_too_fast"
    step = 2
    arguments: ClassVar = {"lr_scheduler_type": "linear"}

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """Step the scheduler twice."""
        trainer = build(**arguments)
        create = trainer.create_scheduler

        def create_scheduler(*args: Any, **kwargs: Any) -> Any:
            scheduler = create(*args, **kwargs) or trainer.lr_scheduler
            step = scheduler.step

            def twice(*args: Any, **kwargs: Any) -> None:
                step(*args, **kwargs)
                step(*args, **kwargs)

            scheduler.step = twice
            return scheduler

        trainer.create_scheduler = create_scheduler
        return trainer
