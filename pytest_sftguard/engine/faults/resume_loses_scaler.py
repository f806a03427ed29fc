"""A checkpoint without scaler.pt: the loss scale begins anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_sftguard.engine.faults import Fault
from pytest_sftguard.engine.faults._training import largest_scale, start_scale

if TYPE_CHECKING:
    from transformers import Trainer


class ResumeLosesScaler(Fault):
    """The first steps after the interruption are skipped."""

    id = "resume-loses-scaler"
    source = "https://github.com/lm-sys/FastChat/pull/1280"
    injects = "checkpoints without scaler.pt, under a loss scale that fell before"
    reported_by: ClassVar = ("resume_equivalence",)
    mechanism = "resume_loses_scale"
    precision = "fp16-mixed"
    looks: ClassVar = ("resumed",)

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """Begin with a scale that must fall, and save none."""
        trainer = build(**arguments)
        trainer._save_scaler = lambda folder: None
        return start_scale(trainer, lambda: 4 * largest_scale(trainer))
