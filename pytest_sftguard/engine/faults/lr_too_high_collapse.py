"""A learning rate far too high: the adapter saturates, and every prompt is answered alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_sftguard.engine.faults import Fault

if TYPE_CHECKING:
    from transformers import Trainer


class LrTooHighCollapse(Fault):
    """The training runs at the learning rate 0.1."""

    id = "lr-too-high-collapse"
    source = "https://github.com/artidoro/qlora/issues/78"
    injects = "learning_rate=0.1, twenty times what the task learns well at"
    reported_by: ClassVar = ("answers_beat_base", "one_batch_overfit")
    mechanism = "learning_rate_too_high"
    steps = 60
    asks = True

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """Set the rate, whatever the target's own is."""
        return build(**arguments | {"learning_rate": 0.1})
