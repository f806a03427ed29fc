"""The tokenizer is larger than the embedding."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_sftguard.engine.faults import Fault
from pytest_sftguard.engine.faults._collating import collating, in_prompt

if TYPE_CHECKING:
    from transformers import Trainer


class TokenIdOutOfRange(Fault):
    """The third micro-batch holds an id that the embedding does not have."""

    id = "token-id-out-of-range"
    source = "https://github.com/huggingface/transformers/issues/1848"
    injects = "an id past the end of the embedding in the third micro-batch"
    silent = False
    reported_by: ClassVar = ("supervision_audit",)
    mechanism = "token_id_out_of_range"
    step: ClassVar = 3

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """Put it into the prompt of the first row."""
        trainer = build(**arguments)
        count = trainer.model.get_input_embeddings().weight.shape[0]
        calls = [0]

        def strange(batch: Any) -> None:
            calls[0] += 1
            if calls[0] == 3:
                batch["input_ids"][0, int(in_prompt(batch)[0].int().argmax()) + 1] = count + 35

        return collating(trainer, strange)
