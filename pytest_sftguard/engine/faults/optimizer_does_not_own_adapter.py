"""An optimizer that was made before the adapter: the loss looks healthy, and nothing ever moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_sftguard.engine.faults import Fault
from pytest_sftguard.engine.faults._adapting import adapting

if TYPE_CHECKING:
    from transformers import Trainer


class OptimizerDoesNotOwnAdapter(Fault):
    """AdamW of the base's parameters, handed over as `optimizers=(optimizer, None)`."""

    id = "optimizer-does-not-own-adapter"
    source = "https://github.com/huggingface/peft/issues/793"
    injects = "optimizer = AdamW(base.parameters()) before get_peft_model"
    reported_by: ClassVar = ("optimizer_owns_trainables", "every_factor_moves")
    mechanism = "adapter_not_in_optimizer"
    tensor = "lora_"

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """Remember what there was before the wrap."""
        import torch

        before: list[Any] = []
        with adapting(lambda base, config, options: before.extend(base.parameters())):
            trainer = build(**arguments)
        trainer.optimizer = torch.optim.AdamW(before, lr=trainer.args.learning_rate)
        return trainer
