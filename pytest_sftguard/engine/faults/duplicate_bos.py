"""The template renders BOS, and the tokenizer adds another."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_sftguard.engine.faults import Fault, NotApplicableError
from pytest_sftguard.engine.faults._collating import collating, insert

if TYPE_CHECKING:
    from transformers import Trainer


class DuplicateBos(Fault):
    """Each row of the training begins with two BOS tokens."""

    id = "duplicate-bos"
    source = "https://github.com/unslothai/unsloth/issues/2648"
    injects = "one more BOS before each row, in training alone"
    reported_by: ClassVar = ("supervision_audit", "prompt_is_prefix")
    mechanism = "duplicate_bos"
    step: ClassVar = 1
    asks = True

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """Insert it before the first token that is attended."""
        trainer = build(**arguments)
        bos = getattr(trainer.processing_class, "bos_token_id", None)
        ids = trainer.train_dataset[0].get("input_ids") if hasattr(trainer.train_dataset, "__getitem__") else None
        if bos is None or ids is None or int(ids[0]) != bos:
            raise NotApplicableError("the target's rows do not begin with a BOS token")

        def double(batch: Any) -> None:
            mask = batch.get("attention_mask")
            ids = batch["input_ids"]
            insert(batch, ids.new_zeros(len(ids)) if mask is None else mask.int().argmax(1), int(bos))

        return collating(trainer, double)
