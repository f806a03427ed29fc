"""A trained head of a tied model, which older versions overwrote with the embedding on loading: a control here."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pytest_sftguard.engine.faults import Fault
from pytest_sftguard.engine.faults._ties import tied

if TYPE_CHECKING:
    from transformers import Trainer


class TiedModulesToSaveLost(Fault):
    """The head is trained whole, and its base shares its weights with the embedding."""

    id = "tied-modules-to-save-lost"
    source = "https://github.com/huggingface/transformers/issues/45127"
    injects = "ties embedding and head, and trains the head whole: sound in these versions"

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """Tie, adapt a projection, and train the head."""
        return tied(build(**arguments), target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
