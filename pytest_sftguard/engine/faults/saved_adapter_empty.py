"""The adapter's file holds nothing: the state was filtered twice, or sharded away."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_sftguard.engine.faults import Fault
from pytest_sftguard.engine.faults._files import after_saving, rewrite

if TYPE_CHECKING:
    from transformers import Trainer


class SavedAdapterEmpty(Fault):
    """The saved file has no tensor in it."""

    id = "saved-adapter-empty"
    source = "https://github.com/huggingface/transformers/issues/24551"
    injects = "saves an empty dict in the place of the adapter's tensors"
    reported_by: ClassVar = ("round_trip", "effect_size")
    mechanism = "adapter_file_empty"

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """Empty what the Trainer saves."""
        return after_saving(build(**arguments), lambda folder: rewrite(folder, lambda tensors: {}))
