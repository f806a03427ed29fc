"""fp16 was asked for, and trains in float32 while every label says fp16."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_sftguard.engine.faults import Fault

if TYPE_CHECKING:
    from transformers import Trainer


class Fp16FlagIgnoredOnCpu(Fault):
    """No autocast and no loss scaler, as accelerate leaves a CPU; the guard's own repair of that is kept away."""

    id = "fp16-flag-ignored-on-cpu"
    source = "https://github.com/bmaltais/kohya_ss/issues/255"
    injects = "args.fp16 taken back once the accelerator has its label"
    reported_by: ClassVar = ("precision_is_real",)
    mechanism = "precision_not_applied"
    precision = "fp16-mixed"

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """Take back the argument; the accelerator goes on to say fp16."""
        trainer = build(**arguments)
        accelerator = trainer.accelerator
        accelerator.native_amp, accelerator.scaler = False, None
        trainer.args.fp16 = False
        return trainer
