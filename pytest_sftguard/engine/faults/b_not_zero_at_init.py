"""Both factors are drawn at random, so that the adapter disturbs the base before it has learned anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_sftguard.engine.faults import Fault
from pytest_sftguard.engine.faults._adapting import adapting

if TYPE_CHECKING:
    from transformers import Trainer


class BNotZeroAtInit(Fault):
    """`init_lora_weights=False`."""

    id = "b-not-zero-at-init"
    source = "https://github.com/hao-ai-lab/FastVideo/pull/781"
    injects = "init_lora_weights=False"
    reported_by: ClassVar = ("identity_at_init",)
    mechanism = "adapter_perturbs_the_base"
    tensor = "lora_B"

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """Build it so."""

        def disturb(base: Any, config: Any, options: dict[str, Any]) -> None:
            config.init_lora_weights = False

        with adapting(disturb):
            return build(**arguments)
