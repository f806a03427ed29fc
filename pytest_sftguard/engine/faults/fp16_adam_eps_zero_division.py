"""Adam's 1e-8 is 0 in float16, and 0 / 0 writes NaN into every lora_A at the first step."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from pytest_sftguard.engine.faults import Fault
from pytest_sftguard.engine.faults._training import cast

if TYPE_CHECKING:
    from transformers import Trainer


class Fp16AdamEpsZeroDivision(Fault):
    """float16 adapters under an AdamW that computes in their type."""

    id = "fp16-adam-eps-zero-division"
    source = "https://github.com/OpenBMB/MiniCPM-V/issues/212"
    injects = "trainables cast to float16, optim=adamw_torch"
    silent = False
    reported_by: ClassVar = ("weights_and_moments_finite", "raw_loss_finite", "gradients_finite")
    mechanism = "eps_underflow_in_float16"
    step = 1
    tensor = "lora_A"
    precision = "fp16-true"
    arguments: ClassVar = {"optim": "adamw_torch"}

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """Cast what is trained."""
        return cast(build(**arguments), torch.float16)
