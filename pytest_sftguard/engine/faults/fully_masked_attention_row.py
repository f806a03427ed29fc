"""A query that no key is left for: softmax over nothing but -inf."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from pytest_sftguard.engine.faults import Fault

if TYPE_CHECKING:
    from transformers import Trainer


class FullyMaskedAttentionRow(Fault):
    """The collator pads on the left and makes the four-dimensional mask itself, with -inf; padding sees nothing."""

    id = "fully-masked-attention-row"
    source = "https://github.com/pytorch/pytorch/issues/103749"
    injects = (
        "batches are padded on the left, under a causal float mask in which the padding's rows are -inf throughout"
    )
    reported_by: ClassVar = ("context_independence", "raw_loss_finite")
    mechanism = "attention_row_fully_masked"

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """Mask what the collator gives."""
        trainer = build(**arguments)
        collate = trainer.data_collator
        dtype = next(trainer.model.parameters()).dtype
        trainer.data_collator = lambda features: _masked(collate(features), dtype)
        return trainer


def _masked(batch: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    ids, labels = batch["input_ids"], batch["labels"]
    held = batch.get("attention_mask", torch.ones_like(ids)).bool()
    rows, lengths = len(ids), held.sum(1)
    width = int(lengths.max()) + 2  # the longest row is padded too
    shown = torch.zeros(rows, width, dtype=torch.bool)
    new_ids, new_labels = ids.new_zeros(rows, width), labels.new_full((rows, width), -100)
    for i, length in enumerate(lengths.tolist()):
        place = slice(width - length, width)
        new_ids[i, place], new_labels[i, place], shown[i, place] = ids[i][held[i]], labels[i][held[i]], True
    seen = torch.ones(width, width, dtype=torch.bool).tril() & shown[:, None, None, :]
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, -torch.inf)
    return {"input_ids": new_ids, "labels": new_labels, "attention_mask": mask}
