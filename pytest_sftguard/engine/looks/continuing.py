"""Rows of the training, continued greedily: where no question is answered, this is what generation is judged by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pytest_sftguard.engine.after import forwards, generation
from pytest_sftguard.engine.looks import InapplicableError, Look
from pytest_sftguard.engine.looks.following import Followed, require_greedy
from pytest_sftguard.engine.stages import Reloaded

_ROWS = 8
_PROMPT, _NEW_TOKENS = 16, 16
"""Largest number of tokens of a row that are continued, and of new ones."""


class Continuing(Look[Reloaded]):
    """Lets the reloaded model continue the beginnings of rows that it was trained on."""

    def conclude(self, reached: Reloaded) -> dict[str, Any]:
        """Compare each new token with the best one in one forward pass."""
        model: Any = reached.reloaded_model
        arithmetic = require_greedy(reached)
        if reached.answered:
            raise InapplicableError("answers to questions are compared instead")
        prompts = _beginnings(reached).to(next(model.parameters()).device)
        config, settings = forwards.inner(model).config, forwards.inner(model).generation_config
        places = getattr(config, "max_position_embeddings", None) or prompts.shape[1] + _NEW_TOKENS
        new = min(_NEW_TOKENS, places - prompts.shape[1])
        if new < 1:
            raise InapplicableError(f"the model has {places} places, which leaves none for new tokens")
        mask = torch.ones_like(prompts)
        ends = generation.end_tokens(model, None)
        padding = settings.pad_token_id if settings.pad_token_id is not None else min(ends, default=0)
        with forwards.evaluating(model):
            # a row that ends at once would leave one token to compare
            length = {"min_new_tokens": new, "max_new_tokens": new}
            output = model.generate(
                input_ids=prompts, attention_mask=mask, do_sample=False, pad_token_id=padding, **length
            )
            followed = Followed(model, reached.trainer.processing_class, mask, output, least=new)
            return {"following": followed.record(arithmetic)}


def _beginnings(reached: Reloaded) -> Tensor:
    """The first tokens of some rows, (rows, tokens), equally many of each, so that nothing is padded."""
    other = sorted(k for k, v in reached.given.items() if not isinstance(v, Tensor) or v.is_floating_point())
    if "input_ids" not in reached.given or any(isinstance(reached.given[k], Tensor) for k in other):
        raise InapplicableError("the model is given more than the ids of tokens")
    rows: list[Tensor] = []
    for batch in reached.batches:
        ids, mask = batch.get("input_ids"), batch.get("attention_mask")
        if not isinstance(ids, Tensor) or ids.dim() != 2:
            continue
        shown = mask.bool() if isinstance(mask, Tensor) and mask.shape == ids.shape else torch.ones_like(ids).bool()
        rows += [row[kept] for row, kept in zip(ids, shown, strict=True)]
    rows = [r for r in rows if len(r) > 1][:_ROWS]
    if not rows:
        raise InapplicableError("no row of the training has two tokens")
    length = min(_PROMPT, *(len(r) // 2 for r in rows))
    return torch.stack([r[:length] for r in rows])
