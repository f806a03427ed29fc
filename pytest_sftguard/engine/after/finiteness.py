"""The probe batch for finished models: long enough and padded, so that no fused kernel hides NaN."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pytest_sftguard.engine.after import forwards
from pytest_sftguard.records import FinitenessRecord

if TYPE_CHECKING:
    from transformers import Trainer

_TOKENS = 16


@dataclass(frozen=True)
class ProbeBatch:
    """Rows of the training data, without labels."""

    plain: dict[str, Tensor]
    """The rows as the collator returns them, at least 16 tokens long."""
    padded: dict[str, Tensor] | None
    """The same rows, one with padding in front; None if the model takes no attention mask."""

    def answers(self, *models: Any) -> tuple[dict[str, Tensor], list[Tensor], str]:
        """Return the inputs, the logits of each model, and why no row is padded; empty if one is."""
        if self.padded is None:
            return self.plain, [m(**self.plain).logits for m in models], "the model takes no attention mask"
        try:
            return self.padded, [m(**self.padded).logits for m in models], ""
        # an error of the model itself shows again without padding
        except Exception as error:
            logits = [m(**self.plain).logits for m in models]
            return self.plain, logits, f"the model takes no padded row: {type(error).__name__}"


def probe_batch(trainer: Trainer) -> ProbeBatch:
    """The first rows of the training data, collated as for training."""
    return probe_of(next(iter(trainer.get_eval_dataloader(trainer.train_dataset))), trainer.model)


def probe_of(batch: Mapping[str, Any], model: Any) -> ProbeBatch:
    """The rows of `batch`, model inputs with or without labels, made at least 16 tokens long.

    Below 16 query tokens the CPU kernel of sdpa hides NaN (pytorch#141128), whatever the attention setting is. A row
    with padding in front has fully masked queries, which can make NaN.
    """
    device = next(model.parameters()).device
    names = ("input_ids", "attention_mask")
    inputs = {k: v.to(device) for k, v in batch.items() if isinstance(v, Tensor) and v.ndim == 2 and k in names}
    length = inputs["input_ids"].shape[1]
    if length < _TOKENS:
        repeats = -(-_TOKENS // length)
        inputs = {k: v.repeat(1, repeats) for k, v in inputs.items()}
    return ProbeBatch(inputs, _left_padded(inputs, model))


def seen(inputs: dict[str, Tensor], logits: list[Tensor], unpadded: str, eager: bool) -> FinitenessRecord:
    """Record of the batch, and of how many of the `logits` are finite."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    parts = [attended(part, inputs) for part in logits]
    return FinitenessRecord(
        rows=ids.shape[0],
        tokens=ids.shape[1],
        padded_rows=int((mask[:, 0] == 0).sum()) if mask is not None else 0,
        attention="eager" if eager else "",
        logits=sum(t.numel() for t in parts),
        nonfinite=sum(int((~t.isfinite()).sum()) for t in parts),
        unpadded=unpadded,
        not_eager="" if eager else "the architecture has no choice of attention",
    )


def attended(logits: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """The logits of tokens that the mask lets through, shape (tokens, words); all of them without a mask."""
    mask = inputs.get("attention_mask")
    if mask is None or logits.dim() != 3 or logits.shape[:2] != mask.shape:
        return logits
    return logits[mask.bool()]


def _left_padded(inputs: dict[str, Tensor], model: Any) -> dict[str, Tensor] | None:
    """The rows with the first one shifted to the right: it loses its end and gets padding in front."""
    if "attention_mask" not in forwards.accepts(model):
        return None
    ids = inputs["input_ids"].clone()
    mask = inputs.get("attention_mask", torch.ones_like(ids)).clone()
    if mask.shape != ids.shape:
        return None
    room = max(1, ids.shape[1] // 4)
    if bool(mask[:, 0].all()):
        fill = getattr(getattr(forwards.inner(model), "config", None), "pad_token_id", None)
        ids[0] = ids[0].roll(room)
        mask[0] = mask[0].roll(room)
        ids[0, :room] = fill if isinstance(fill, int) and fill >= 0 else 0
        mask[0, :room] = 0
    return {"input_ids": ids, "attention_mask": mask}
