"""Merging into half-precision weights rounds a small adapter away."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_sftguard.engine.faults import Fault

if TYPE_CHECKING:
    from transformers import Trainer


class MergeDrift(Fault):
    """An adapter trained at the learning rate 1e-5 is merged into bfloat16."""

    id = "merge-drift"
    source = "https://github.com/huggingface/peft/issues/1388"
    injects = "learning_rate=1e-5 beside a base in bfloat16: most of what the adapter adds is below half an ulp"
    reported_by: ClassVar = ("merge_equivalence",)
    mechanism = "merge_swallowed_in_bfloat16"
    precision = "bf16-true"
    steps = 30

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """Set the rate, whatever the target's own is."""
        return build(**arguments | {"learning_rate": 1e-5})
