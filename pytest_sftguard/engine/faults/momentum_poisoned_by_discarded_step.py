"""A step that the loss scaler discards enters the momentum all the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_sftguard.engine.faults import Fault
from pytest_sftguard.engine.faults._training import At, factor, spoil_gradient

if TYPE_CHECKING:
    from transformers import Trainer


class MomentumPoisonedByDiscardedStep(Fault):
    """An overflow in step 3, and a moment that is updated before anybody looks for one."""

    id = "momentum-poisoned-by-discarded-step"
    source = "https://github.com/deepspeedai/DeepSpeed/pull/8435"
    injects = "inf in a gradient of step 3 under a loss scaler, and the first moment takes it in"
    reported_by: ClassVar = ("weights_and_moments_finite",)
    mechanism = "optimizer_state_poisoned"
    step = 3
    tensor = "lora_B"
    precision = "fp16-mixed"

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """Update the moment before the scaler looks."""
        trainer = build(**arguments)
        parameter = factor(trainer, "lora_B")

        def begin() -> None:
            optimizer = trainer.optimizer
            step = optimizer.step

            def too_early(*args: Any, **kwargs: Any) -> Any:
                gradient, moment = parameter.grad, optimizer.state.get(parameter, {}).get("exp_avg")
                if gradient is not None and moment is not None and not gradient.isfinite().all():
                    moment.add_(gradient, alpha=0.1)
                return step(*args, **kwargs)

            optimizer.step = too_early

        trainer.add_callback(At("on_train_begin", begin))
        return spoil_gradient(trainer, parameter, math.inf, 3)
