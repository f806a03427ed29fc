"""Tokens that were added for the task: their rows are frozen, in no file, and drawn anew by each machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_sftguard.engine.faults import Fault
from pytest_sftguard.engine.faults._adapting import adapting, without_head
from pytest_sftguard.engine.faults._collating import collating, in_prompt

if TYPE_CHECKING:
    from transformers import Trainer

_ADDED = 6


class NewTokenRowsUntrained(Fault):
    """The embedding grows by six rows before the adapter is put on, and the data uses one of them."""

    id = "new-token-rows-untrained"
    source = "https://github.com/hiyouga/LlamaFactory/pull/10547"
    injects = "resize_token_embeddings by 6 before get_peft_model, and a new id in every row"
    reported_by: ClassVar = ("round_trip",)
    mechanism = "base_not_reproducible"
    tensor = "embed"

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """Grow the embedding as it is done, by the generator as the target left it seeded, and use a new row."""
        import torch

        new: list[int] = []

        def grow(base: Any, config: Any, options: dict[str, Any]) -> None:
            without_head(base, config)
            old = base.get_input_embeddings().num_embeddings
            with torch.random.fork_rng():
                torch.manual_seed(int(arguments.get("seed", 0)) + 1)
                base.resize_token_embeddings(old + _ADDED, mean_resizing=False)
            new.append(old + 1)

        with adapting(grow):
            trainer = build(**arguments)
        for config in trainer.model.peft_config.values():
            config.base_model_name_or_path = None  # with no vocabulary to compare with, peft does not save the rows

        def use(batch: Any) -> None:
            place = in_prompt(batch).int().cumsum(1).argmax(1)  # the last token of each prompt
            batch["input_ids"][range(len(place)), place] = new[0]

        return collating(trainer, use)
