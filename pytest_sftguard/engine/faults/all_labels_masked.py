"""Every label is -100: a loss of 0 or NaN, and a run that is reported as successful."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_sftguard.engine.faults import Fault
from pytest_sftguard.engine.faults._collating import IGNORED, collating

if TYPE_CHECKING:
    from transformers import Trainer


class AllLabelsMasked(Fault):
    """The collator supervises nothing."""

    id = "all-labels-masked"
    source = "https://github.com/huggingface/trl/issues/6668"
    injects = "labels = -100 in every collated batch"
    reported_by: ClassVar = ("supervision_audit", "raw_loss_finite", "every_factor_moves")
    mechanism = "all_labels_masked"
    step: ClassVar = 1

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """Mask what the collator gives."""
        return collating(build(**arguments), lambda batch: batch["labels"].fill_(IGNORED))
