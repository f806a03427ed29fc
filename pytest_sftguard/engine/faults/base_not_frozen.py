"""The base trains along, and the adapter's file does not hold what it learns."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_sftguard.engine.faults import Fault

if TYPE_CHECKING:
    from transformers import Trainer


class BaseNotFrozen(Fault):
    """`requires_grad_(True)` on everything."""

    id = "base-not-frozen"
    source = "https://github.com/huggingface/peft/issues/2759"
    injects = "requires_grad_(True) on every tensor of the model"
    reported_by: ClassVar = ("base_bit_frozen", "trainable_set_exact", "round_trip")
    mechanism = "base_not_frozen"
    tensor = "base_model"

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """Let all that can take a gradient take one."""
        trainer = build(**arguments)
        for parameter in trainer.model.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(True)
        return trainer
