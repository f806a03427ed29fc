"""A NaN step is reported as loss 0.0, or as a healthy mean."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_sftguard.engine.faults import Fault
from pytest_sftguard.engine.faults._training import At, multiply_loss, trainables

if TYPE_CHECKING:
    from transformers import Trainer


class NanLossLoggedAsZero(Fault):
    """A loss that is NaN, gradients of it that a callback cleans, and a log whose filter shows 0.0."""

    id = "nan-loss-logged-as-zero"
    source = "https://github.com/huggingface/trl/issues/6702"
    injects = "loss * nan in step 3, nan_to_num on the gradients before the optimizer, logging_nan_inf_filter on"
    reported_by: ClassVar = ("log_honest", "raw_loss_finite", "gradients_finite")
    mechanism = "log_laundered"
    step = 3

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """Spoil a loss, and clean the gradients as scripts do that want no NaN in their weights."""
        trainer = multiply_loss(build(**arguments), math.nan, 3)
        trainer.args.logging_nan_inf_filter = True

        def clean() -> None:
            for parameter in trainables(trainer).values():
                if parameter.grad is not None:
                    parameter.grad.nan_to_num_(0.0, 0.0, 0.0)

        trainer.add_callback(At("on_pre_optimizer_step", clean))
        return trainer
