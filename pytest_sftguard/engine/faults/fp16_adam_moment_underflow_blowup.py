"""Fused Adam stores its second moment in float16, as 0: updates of thousands of learning rates."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from pytest_sftguard.engine.faults import Fault
from pytest_sftguard.engine.faults._training import cast

if TYPE_CHECKING:
    from transformers import Trainer


class Fp16AdamMomentUnderflowBlowup(Fault):
    """float16 adapters under the optimizer that the Trainer takes by itself."""

    id = "fp16-adam-moment-underflow-blowup"
    source = "https://github.com/matanbt/TROPT/pull/8"
    injects = "trainables cast to float16, optim=adamw_torch_fused"
    reported_by: ClassVar = ("update_upper_bound", "update_lower_bound")
    mechanism = "moments_underflow_in_float16"
    tensor = "lora_"
    precision = "fp16-true"
    arguments: ClassVar = {"optim": "adamw_torch_fused", "learning_rate": 1e-4}

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """Cast what is trained."""
        return cast(build(**arguments), torch.float16)
