"""transformers 5 loads in the checkpoint's type: what was float32 by default is trained in half precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_sftguard.engine.faults import Fault
from pytest_sftguard.engine.faults._adapting import adapting, without_head

if TYPE_CHECKING:
    from transformers import Trainer


class DefaultDtypeIsCheckpointDtype(Fault):
    """The base comes in bfloat16 whatever was asked for, and its head is trained whole."""

    id = "default-dtype-is-checkpoint-dtype"
    source = "https://github.com/huggingface/sentence-transformers/pull/3773"
    injects = "dtype of the checkpoint, bfloat16, in a float32 cell; the head in modules_to_save"
    reported_by: ClassVar = ("fp32_master", "precision_is_real")
    mechanism = "trainables_in_the_checkpoints_type"
    tensor = "modules_to_save"

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """Load it so, and have the head saved with the adapter."""

        def save_head(base: Any, config: Any, options: dict[str, Any]) -> None:
            config.modules_to_save = [*(config.modules_to_save or ()), *without_head(base, config)]

        with adapting(save_head):
            return build(**{**arguments, "dtype": "bfloat16"})
