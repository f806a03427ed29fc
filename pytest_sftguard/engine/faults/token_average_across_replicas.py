"""Each process divides by its own labels: what is learned depends on how tokens fall on ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_sftguard.engine.faults import Fault
from pytest_sftguard.engine.faults._unevenly import unevenly

if TYPE_CHECKING:
    from transformers import Trainer


class TokenAverageAcrossReplicas(Fault):
    """DDP averages means: the default of the Trainer until July 2025, and an option since."""

    id = "token-average-across-replicas"
    source = "https://github.com/huggingface/transformers/issues/34242"
    injects = "average_tokens_across_devices=False"
    reported_by: ClassVar = ("replica_equivalence",)
    mechanism = "replicas_average_means"
    step = 1
    batch = (8, 1)
    arguments: ClassVar = {"average_tokens_across_devices": False}
    looks: ClassVar = ("replicas",)

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """Nothing but rows of uneven length, which show it."""
        return unevenly(build(**arguments))
