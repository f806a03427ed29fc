"""A checkpoint lost its loss scale: the resumed run starts at the first one again, and skips steps anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_sftguard.engine.building.cpu_float16 import make_real
from pytest_sftguard.engine.faults import Fault
from pytest_sftguard.engine.faults._training import largest_scale

if TYPE_CHECKING:
    from transformers import Trainer


class ResumeLosesScaler(Fault):
    """The scaler starts too high, as it always does, and finds its scale in the first steps."""

    id = "resume-loses-scaler"
    source = "https://github.com/lm-sys/FastChat/pull/1280"
    injects = "scaler.pt not saved, a first scale four times above what fits"
    reported_by: ClassVar = ("resume_equivalence",)
    mechanism = "resume_loses_scale"
    step = 5
    precision = "fp16-mixed"
    looks: ClassVar = ("resumed",)

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """Save everything else."""
        trainer = build(**arguments)
        make_real(trainer)
        scaler = trainer.accelerator.scaler
        if scaler is not None:
            scaler.load_state_dict(scaler.state_dict() | {"scale": 4 * largest_scale(trainer)})
        trainer._save_scaler = lambda folder: None
        return trainer
