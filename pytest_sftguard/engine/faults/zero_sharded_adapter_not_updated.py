"""The optimizer's updates never reach the adapter: they are applied to another copy, or dropped."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_sftguard.engine.faults import Fault

if TYPE_CHECKING:
    from transformers import Trainer


class ZeroShardedAdapterNotUpdated(Fault):
    """The optimizer's step does nothing."""

    id = "zero-sharded-adapter-not-updated"
    source = "https://github.com/huggingface/peft/issues/1402"
    injects = "skips optimizer.step, as a sharded optimizer does whose shards lack the adapter"
    reported_by: ClassVar = ("every_factor_moves", "effective_steps")
    mechanism = "adapter_not_in_optimizer"

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """Drop every update."""
        trainer = build(**arguments)
        create = trainer.create_optimizer

        def created(*args: Any, **kwargs: Any) -> Any:
            optimizer = create(*args, **kwargs)
            optimizer.step = lambda closure=None: None
            return optimizer

        trainer.create_optimizer = created
        return trainer
