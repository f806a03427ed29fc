"""The probe batch for finished models: long enough and padded, so that no fused kernel hides NaN."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pytest_sftguard.engine.after import forwards
from pytest_sftguard.engine.surroundings.errors import own_work
from pytest_sftguard.records import FinitenessRecord

_TOKENS = 16


@dataclass(frozen=True)
class ProbeBatch:
    """What the model was given in the training, without labels."""

    plain: dict[str, Any]
    """The arguments by name; rows of tokens are at least 16 tokens long."""
    padded: dict[str, Tensor] | None
    """The same rows of tokens, one with padding in front; None where none can be padded."""
    unpadded: str = ""
    """Why none can be padded; empty where one can."""

    def answers(self, *models: Any) -> tuple[dict[str, Any], list[Tensor], str]:
        """Return the inputs, the main output of each model, and why no row is padded; empty if one is."""
        if self.padded is None:
            return self.plain, [forwards.asked(m, self.plain) for m in models], self.unpadded
        try:
            return self.padded, [forwards.asked(m, self.padded) for m in models], ""
        # an error of the model itself shows again without padding
        except Exception as error:
            outputs = [forwards.asked(m, self.plain) for m in models]
            return self.plain, outputs, f"the model takes no padded row: {type(error).__name__}"


@own_work
def probe_of(given: Mapping[str, Any], model: Any) -> ProbeBatch:
    """The arguments `given` to `model` in the training; rows of tokens are made at least 16 tokens long.

    Below 16 query tokens the CPU kernel of sdpa hides NaN (pytorch#141128), whatever the attention setting is. A row
    with padding in front has fully masked queries, which can make NaN.
    """
    device = next(model.parameters()).device
    plain = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in given.items()}
    ids = plain.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
        return ProbeBatch(plain, None, "the model is not given rows of input_ids")
    others = [k for k, v in plain.items() if k != "attention_mask" and _is_no_number_per_token(v)]
    if others:
        return ProbeBatch(plain, None, f"the model is given {', '.join(others)} beside its tokens")
    decodes = "labels" in plain or any(k.startswith("decoder_") for k in plain)
    if ids.shape[1] < _TOKENS:
        plain = _lengthened(plain, ids) | {k: v for k, v in plain.items() if decodes and k not in _PER_TOKEN}
    padded = _left_padded(plain, model)
    if padded is None:
        return ProbeBatch(plain, None, "the model takes no attention mask with one number for each token")
    return ProbeBatch(plain, plain | padded if decodes else padded)


_PER_TOKEN = ("input_ids", "attention_mask", "token_type_ids")
"""Arguments of an encoder, or of a model without one, with a number for each token."""


def _is_no_number_per_token(value: Any) -> bool:
    """Whether an argument is an image, a sound, embeddings or a structure of tensors."""
    return isinstance(value, (list, tuple, dict)) or (isinstance(value, Tensor) and value.is_floating_point())


def _lengthened(plain: dict[str, Any], ids: Tensor) -> dict[str, Any]:
    """The rows repeated to 16 tokens, and the switches; without positions, which show where packed rows begin."""
    repeats = -(-_TOKENS // ids.shape[1])
    rows = {k: v for k, v in plain.items() if isinstance(v, Tensor) and v.shape == ids.shape and k in _PER_TOKEN}
    switches = {k: v for k, v in plain.items() if not isinstance(v, Tensor)}
    return switches | {k: v.repeat(1, repeats) for k, v in rows.items()}


def seen(inputs: dict[str, Any], logits: list[Tensor], unpadded: str, eager: bool) -> FinitenessRecord:
    """Record of the batch, and of how many of the `logits` are finite."""
    parts = [attended(part, inputs) for part in logits]
    padded = 0 if unpadded else int((inputs["attention_mask"][:, 0] == 0).sum())
    ids = inputs.get("input_ids")
    tokens = ids.shape[1] if isinstance(ids, Tensor) and ids.dim() == 2 else None
    return FinitenessRecord(
        rows=len(logits[0]),
        tokens=tokens if not unpadded or (tokens or 0) >= _TOKENS else None,
        padded_rows=padded,
        attention="eager" if eager else "",
        logits=sum(t.numel() for t in parts),
        nonfinite=sum(int((~t.isfinite()).sum()) for t in parts),
        unpadded=unpadded,
        not_eager="" if eager else "the architecture has no choice of attention",
    )


def attended(logits: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """The logits of tokens that the mask lets through, shape (tokens, words); all of them without a mask.

    The logits of a prompt that an adapter puts in front of each row are left out.
    """
    mask, ids = inputs.get("attention_mask"), inputs.get("input_ids")
    if isinstance(ids, Tensor) and logits.dim() == 3 and len(logits) == len(ids) and logits.shape[1] > ids.shape[-1]:
        logits = logits[:, -ids.shape[-1] :]
    if not isinstance(mask, Tensor) or logits.dim() != 3 or logits.shape[:2] != mask.shape:
        return logits
    return logits[mask.bool()]


def _left_padded(inputs: dict[str, Any], model: Any) -> dict[str, Tensor] | None:
    """The rows with the first one shifted to the right: it loses its end and gets padding in front."""
    if "attention_mask" not in forwards.accepts(model):
        return None
    ids = inputs["input_ids"].clone()
    held = inputs.get("attention_mask")
    mask = held.clone() if isinstance(held, Tensor) else torch.ones_like(ids)
    if mask.shape != ids.shape:
        return None
    room = max(1, ids.shape[1] // 4)
    if bool(mask[:, 0].all()):
        ids[0] = ids[0].roll(room)
        mask[0] = mask[0].roll(room)
        ids[0, :room] = forwards.padding_id(model)
        mask[0, :room] = 0
    return {"input_ids": ids, "attention_mask": mask}
