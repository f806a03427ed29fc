"""The adapter is used at another scale than it was trained at."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_sftguard.engine.faults import Fault
from pytest_sftguard.engine.faults._files import after_saving, configure

if TYPE_CHECKING:
    from transformers import Trainer


class AlphaScalingWrong(Fault):
    """The saved configuration says four times the alpha that was trained with."""

    id = "alpha-scaling-wrong"
    source = "https://github.com/Blaizzy/mlx-vlm/issues/841"
    injects = "multiplies lora_alpha by 4 in the saved adapter_config.json"
    reported_by: ClassVar = ("round_trip",)
    mechanism = "scaling_wrong"

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """Edit what the Trainer saves."""

        def louder(settings: dict[str, Any]) -> dict[str, Any]:
            return settings | {"lora_alpha": 4 * settings["lora_alpha"]}

        return after_saving(build(**arguments), lambda folder: configure(folder, louder))
