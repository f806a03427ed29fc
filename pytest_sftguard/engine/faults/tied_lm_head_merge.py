"""LoRA on the head of a tied model: merging rewrites the input embedding too."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_sftguard.engine.faults import Fault
from pytest_sftguard.engine.faults._ties import tied

if TYPE_CHECKING:
    from transformers import Trainer


class TiedLmHeadMerge(Fault):
    """The head is adapted, and shares its weights with the embedding."""

    id = "tied-lm-head-merge"
    source = "https://github.com/huggingface/peft/issues/2018"
    injects = "ties embedding and head, and puts the adapter on q_proj and lm_head"
    reported_by: ClassVar = ("merge_equivalence",)
    mechanism = "merge_rewrites_tied_embedding"
    tensor = "embed"
    steps = 10

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """Tie, and adapt both ends of the model."""
        return tied(build(**arguments), target_modules=["q_proj", "lm_head"])
