"""Updates round to nothing in bfloat16: lora_A stays at its random start."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from pytest_sftguard.engine.faults import Fault
from pytest_sftguard.engine.faults._training import cast

if TYPE_CHECKING:
    from transformers import Trainer


class Bf16AdapterUpdateSwallow(Fault):
    """bfloat16 adapters and a learning rate that is small beside their elements."""

    id = "bf16-adapter-update-swallow"
    source = "https://github.com/pytorch/ao/pull/1124"
    injects = "trainables cast to bfloat16, learning_rate=1e-5"
    reported_by: ClassVar = ("update_lower_bound", "every_factor_moves")
    mechanism = "updates_swallowed_in_bfloat16"
    tensor = "lora_A"
    precision = "bf16-true"
    arguments: ClassVar = {"learning_rate": 1e-5}

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """Cast what is trained."""
        return cast(build(**arguments), torch.bfloat16)
