"""A checkpoint lost its schedule: the Trainer resumes without it, and without the optimizer's state beside it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_sftguard.engine.faults import Fault

if TYPE_CHECKING:
    from transformers import Trainer


class ResumeLosesOptimizerOrSchedule(Fault):
    """transformers skips both files where one of them is missing, and says nothing."""

    id = "resume-loses-optimizer-or-schedule"
    source = "https://github.com/huggingface/peft/issues/859"
    injects = "scheduler.pt deleted from every checkpoint"
    reported_by: ClassVar = ("resume_equivalence",)
    mechanism = "resume_loses_state"
    step = 5
    looks: ClassVar = ("resumed",)

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """Delete the file after it was saved."""
        trainer = build(**arguments)
        original = trainer._save_optimizer_and_scheduler

        @functools.wraps(original)
        def save(folder: str) -> None:
            original(folder)
            (Path(folder) / "scheduler.pt").unlink(missing_ok=True)

        trainer._save_optimizer_and_scheduler = save
        return trainer
