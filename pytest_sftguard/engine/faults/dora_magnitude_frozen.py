"""DoRA's magnitudes in bfloat16: they stay where they were, and the run is one of plain LoRA."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_sftguard.engine.faults import Fault
from pytest_sftguard.engine.faults._adapting import adapting

if TYPE_CHECKING:
    from transformers import Trainer


class DoraMagnitudeFrozen(Fault):
    """The adapter is weight-decomposed, and its magnitudes are cast as the path for quantised bases does."""

    id = "dora-magnitude-frozen"
    source = "https://github.com/huggingface/trl/pull/7272"
    injects = "use_dora=True, magnitudes in bfloat16, learning rate 1e-4"
    reported_by: ClassVar = ("fp32_master", "every_factor_moves")
    mechanism = "updates_swallowed_in_bfloat16"
    tensor = "lora_magnitude_vector"
    arguments: ClassVar = {"learning_rate": 1e-4}

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """Build it so, and cast."""
        import torch

        def decompose(base: Any, config: Any, options: dict[str, Any]) -> None:
            config.use_dora = True

        with adapting(decompose):
            trainer = build(**arguments)
        for name, parameter in trainer.model.named_parameters():
            if "lora_magnitude_vector" in name:
                parameter.data = parameter.data.to(torch.bfloat16)
        return trainer
