"""A loaded adapter that is not trainable, under gradient checkpointing: backward works, and nothing trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_sftguard.engine.faults import Fault
from pytest_sftguard.engine.faults._adapting import adapting

if TYPE_CHECKING:
    from transformers import Trainer


class CheckpointingMasksFrozenAdapter(Fault):
    """The adapter is in inference mode, as `PeftModel.from_pretrained` leaves it, and gradients are checkpointed."""

    id = "checkpointing-masks-frozen-adapter"
    source = "https://github.com/huggingface/trl/issues/6700"
    injects = "inference_mode=True, as from_pretrained without is_trainable sets it, and gradient_checkpointing=True"
    reported_by: ClassVar = ("trainable_set_exact", "optimizer_owns_trainables", "every_factor_moves")
    mechanism = "adapter_frozen"
    tensor = "lora_"

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """Build it so, and let the inputs require gradients, as checkpointing does."""

        def freeze(base: Any, config: Any, options: dict[str, Any]) -> None:
            config.inference_mode = True

        options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
        with adapting(freeze):
            trainer = build(**{**arguments, **options})
        trainer.model.enable_input_require_grads()
        return trainer
