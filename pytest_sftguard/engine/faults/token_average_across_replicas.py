"""Each process divides by its own tokens, and the means are averaged."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_sftguard.engine.faults import Fault
from pytest_sftguard.engine.faults._collating import uneven

if TYPE_CHECKING:
    from transformers import Trainer


class TokenAverageAcrossReplicas(Fault):
    """The result depends on how tokens fall on processes."""

    id = "token-average-across-replicas"
    source = "https://github.com/huggingface/transformers/issues/34242"
    injects = "average_tokens_across_devices=False, on rows of uneven length"
    reported_by: ClassVar = ("replica_equivalence",)
    mechanism = "replicas_average_means"
    looks: ClassVar = ("replicas",)

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """Average means."""
        return uneven(build(**arguments | {"average_tokens_across_devices": False}))
