"""A checkpoint without optimizer.pt is resumed from as if nothing were missing."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_sftguard.engine.faults import Fault

if TYPE_CHECKING:
    from transformers import Trainer


class ResumeLosesOptimizerOrSchedule(Fault):
    """Optimizer and schedule begin anew."""

    id = "resume-loses-optimizer-or-schedule"
    source = "https://github.com/huggingface/peft/issues/859"
    injects = "checkpoints without optimizer.pt and scheduler.pt, linear schedule"
    reported_by: ClassVar = ("resume_equivalence",)
    mechanism = "resume_loses_state"
    arguments: ClassVar = {"lr_scheduler_type": "linear"}
    looks: ClassVar = ("resumed",)

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """Save neither."""
        trainer = build(**arguments)
        trainer._save_optimizer_and_scheduler = lambda folder: None
        return trainer
