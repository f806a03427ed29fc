"""One NaN in the trained adapter: it is saved, loaded and merged without complaint."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from transformers import TrainerCallback

from pytest_sftguard.engine.faults import Fault

if TYPE_CHECKING:
    from transformers import Trainer


class NanAdapterSavedAndServed(Fault):
    """One entry of one `lora_B` is NaN when the training is over."""

    id = "nan-adapter-saved-and-served"
    source = "https://github.com/facebookresearch/habitat-lab/pull/2229"
    injects = "writes NaN into one entry of the first lora_B after the last step"
    reported_by: ClassVar = ("weights_and_moments_finite", "round_trip")
    mechanism = "nan_in_adapter"
    tensor = "lora_B"

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """Poison what has been trained."""
        trainer = build(**arguments)
        trainer.add_callback(_Poison())
        return trainer


class _Poison(TrainerCallback):  # type: ignore[misc] # transformers types its callbacks as Any
    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = kwargs["model"].named_parameters()
        factor = next(p for n, p in named if "lora_B" in n and p.requires_grad)
        factor.data.view(-1)[0] = math.nan
