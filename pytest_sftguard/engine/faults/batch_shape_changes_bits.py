"""Low precision depends on batch shape, threads and device, soundly: a control."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_sftguard.engine.faults import Fault
from pytest_sftguard.engine.faults._collating import uneven

if TYPE_CHECKING:
    from transformers import Trainer


class BatchShapeChangesBits(Fault):
    """Other cuts of the batch give other bits, and nothing is wrong."""

    id = "batch-shape-changes-bits"
    source = "https://github.com/pytorch/pytorch/issues/187445"
    injects = "nothing: rows of uneven length in bfloat16, in two cuts and twice"
    precision = "bf16-mixed"
    batch = (4, 2)
    looks: ClassVar = ("rerun",)

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """Make rows uneven, which is no fault."""
        return uneven(build(**arguments))
