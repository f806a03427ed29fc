"""The schedule runs down while the loss scaler skips every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_sftguard.engine.faults import Fault
from pytest_sftguard.engine.faults._training import start_scale

if TYPE_CHECKING:
    from transformers import Trainer


class SkippedStepFlagLiesWithFusedAdam(Fault):
    """A loss scale that never fits, and a fused AdamW of which accelerate believes that it stepped."""

    id = "skipped-step-flag-lies-with-fused-adam"
    source = "https://github.com/huggingface/accelerate/issues/4242"
    injects = "GradScaler that begins at 2**100, optim=adamw_torch_fused, linear schedule"
    reported_by: ClassVar = ("effective_steps", "lr_trace", "every_factor_moves")
    mechanism = "schedule_runs_at_skipped_steps"
    step = 1
    precision = "fp16-mixed"
    arguments: ClassVar = {"optim": "adamw_torch_fused", "lr_scheduler_type": "linear"}

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """Begin with a scale under which everything overflows."""
        return start_scale(build(**arguments), lambda: 2.0**100)
