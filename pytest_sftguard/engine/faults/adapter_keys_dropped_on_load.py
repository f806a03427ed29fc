"""The names in the adapter's file do not fit the model: the base answers under the adapter's name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_sftguard.engine.faults import Fault
from pytest_sftguard.engine.faults._files import after_saving, rewrite

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Trainer


class AdapterKeysDroppedOnLoad(Fault):
    """Every tensor in the saved file has one `model.` too few in its name."""

    id = "adapter-keys-dropped-on-load"
    source = "https://github.com/huggingface/peft/issues/2566"
    injects = "strips one `model.` from every key of the saved adapter_model.safetensors"
    reported_by: ClassVar = ("round_trip", "effect_size")
    mechanism = "adapter_keys_dropped"

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """Rename what the Trainer saves."""

        def stripped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name.replace("model.", "", 1): tensor for name, tensor in tensors.items()}

        return after_saving(build(**arguments), lambda folder: rewrite(folder, stripped))
