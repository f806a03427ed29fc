"""The loss mask is missing: the model also learns the prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_sftguard.engine.faults import Fault
from pytest_sftguard.engine.faults._collating import collating, in_prompt

if TYPE_CHECKING:
    from transformers import Trainer


class PromptNotMasked(Fault):
    """A mask that is not there falls back to ones."""

    id = "prompt-not-masked"
    source = "https://github.com/NVIDIA-NeMo/Megatron-Bridge/issues/3359"
    injects = "labels = input_ids wherever the row is attended"
    reported_by: ClassVar = ("supervision_audit",)
    mechanism = "prompt_supervised"
    step: ClassVar = 1
    asks = True

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """Supervise the prompt, too."""

        def unmask(batch: Any) -> None:
            prompt = in_prompt(batch)
            batch["labels"][prompt] = batch["input_ids"][prompt]

        return collating(build(**arguments), unmask)
