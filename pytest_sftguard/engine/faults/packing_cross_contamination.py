"""Rows that are packed into one attend to each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from pytest_sftguard.engine.faults import Fault

if TYPE_CHECKING:
    from transformers import Trainer


class PackingCrossContamination(Fault):
    """Two rows in one, positions restarting: right, but for an attention mask of ones, which switches that off."""

    id = "packing-cross-contamination"
    source = "https://github.com/huggingface/trl/issues/1230"
    injects = (
        "every two rows of a batch are packed into one, with position_ids that restart and an attention_mask of ones"
    )
    reported_by: ClassVar = ("context_independence",)
    mechanism = "packed_rows_see_each_other"

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """Pack what the collator gives."""
        trainer = build(**arguments)
        collate = trainer.data_collator
        trainer.data_collator = lambda features: _packed(collate(features))
        return trainer


def _packed(batch: Any) -> dict[str, torch.Tensor]:
    ids, labels = batch["input_ids"], batch["labels"]
    mask = batch.get("attention_mask", torch.ones_like(ids)).bool()
    rows = [(i[m], w[m], torch.arange(int(m.sum()))) for i, w, m in zip(ids, labels, mask, strict=True)]
    for _, supervised, _ in rows:
        supervised[0] = -100  # the last token of a row does not predict the next row's first
    packs = [[torch.cat(parts) for parts in zip(*rows[i : i + 2], strict=True)] for i in range(0, len(rows), 2)]
    width = max(len(pack[0]) for pack in packs)

    def filled(index: int, fill: int) -> torch.Tensor:
        return torch.stack([torch.nn.functional.pad(p[index], (0, width - len(p[index])), value=fill) for p in packs])

    return {
        "input_ids": filled(0, 0),
        "labels": filled(1, -100),
        "position_ids": filled(2, 0),
        "attention_mask": torch.stack([torch.arange(width) < len(p[0]) for p in packs]).long(),
    }
