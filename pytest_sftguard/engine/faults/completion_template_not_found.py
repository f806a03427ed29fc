"""The mark of the answer is not found in some rows, which drop out of the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_sftguard.engine.faults import Fault
from pytest_sftguard.engine.faults._collating import IGNORED, collating

if TYPE_CHECKING:
    from transformers import Trainer


class CompletionTemplateNotFound(Fault):
    """Three rows of ten have no label; which ones depends on their tokens."""

    id = "completion-template-not-found"
    source = "https://github.com/huggingface/trl/issues/1920"
    injects = "labels = -100 in 30 % of the rows, chosen by their tokens"
    reported_by: ClassVar = ("supervision_audit",)
    mechanism = "rows_without_labels"

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """Mask them as a collator does that searches for a template."""

        def search(batch: Any) -> None:
            for row, labels in zip(batch["input_ids"].tolist(), batch["labels"], strict=True):
                if sum(i * (place % 7 + 1) for place, i in enumerate(row)) % 10 < 3:
                    labels.fill_(IGNORED)

        return collating(build(**arguments), search)
