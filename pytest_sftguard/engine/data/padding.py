"""Padding against labels and masks: labels where no token is, and tokens where the mask says that there is none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from pytest_sftguard.engine.data.rows import IGNORED
from pytest_sftguard.engine.recording.watching import STEP
from pytest_sftguard.records import DefectRecord

IN_PLACE, SHIFT, OWN_SHIFT = 0, -1, 1
"""Where the token is that a label counts with, beside the one in its own place: none other, the one before (it predicts
the label), or the one after (labels that were shifted already: it is the label)."""


def comparable(batch: Mapping[str, Any]) -> bool:
    """Whether a micro-batch has labels for each of its token ids, in whole numbers."""
    ids, labels = batch.get("input_ids"), batch.get("labels")
    if not (isinstance(ids, Tensor) and isinstance(labels, Tensor)) or ids.dim() != 2 or ids.shape != labels.shape:
        return False
    return not ids.is_floating_point() and not labels.is_floating_point()


def defect(batches: Iterable[Mapping[str, Any]], pad: int | None, other: int) -> DefectRecord | None:
    """The defect `padding_supervised` of the micro-batches; None if no row has it.

    A label counts on padding if its own place and the `other` one are both padding. So a first padding place may hold
    the end token's label in a row that is padded on the right, and the first token of one that is padded on the left
    may be predicted from padding; both are common and harmless. Padding is what a mask of two dimensions leaves out,
    and a run of the id `pad` up to the end of the row; None stands for an id that a sequence may end in.
    """
    rows, first, example = 0, None, ""
    for batch in filter(comparable, batches):
        ids, labels = batch["input_ids"], batch["labels"]
        bad = (labels != IGNORED) & _padding(ids, batch.get("attention_mask"), pad, other)
        if other == SHIFT:
            # nothing predicts the first token
            bad[:, 0] = False
        found = bad.any(1)
        count = int(found.sum())
        if count and first is None:
            places = bad[int(found.nonzero()[0, 0])].nonzero()[:, 0].tolist()
            first, example = (
                int(batch[STEP]),
                f"{len(places)} labels of a row, at place {places[0]} of {ids.shape[1]} first",
            )
        rows += count
    return DefectRecord(name="padding_supervised", rows=rows, step=first, example=example) if rows else None


def hidden(batches: Iterable[Mapping[str, Any]], pad: int | None) -> DefectRecord | None:
    """The defect `hidden_tokens` of the micro-batches, whose mask hides tokens of a row; None if no row has it.

    Padding is in front of a row's tokens or behind them. So a place that a mask of two dimensions hides between two
    that it shows is a token, unless it holds the id `pad`, as between the sequences of a pack. What is hidden at one
    end of a row, and is not `pad`, is a token where `pad` is shown at the other end: such a mask is shifted.
    """
    rows, first, example = 0, None, ""
    for batch in batches:
        ids, mask = batch.get("input_ids"), batch.get("attention_mask")
        if not (isinstance(ids, Tensor) and isinstance(mask, Tensor)) or ids.dim() != 2 or ids.shape != mask.shape:
            continue
        shown = mask.to(ids.device) != 0
        token = torch.ones_like(shown) if pad is None else ids != pad
        inside = (shown.cumsum(1) > 0) & (shown.flip(1).cumsum(1).flip(1) > 0)
        bad = ~shown & token & (inside | _beside_padding(shown, token)[:, None])
        found = bad.any(1)
        count = int(found.sum())
        if count and first is None:
            places = bad[int(found.nonzero()[0, 0])].nonzero()[:, 0].tolist()
            first = int(batch[STEP])
            example = f"{len(places)} tokens of a row, at place {places[0]} of {ids.shape[1]} first"
        rows += count
    return DefectRecord(name="hidden_tokens", rows=rows, step=first, example=example) if rows else None


def _beside_padding(shown: Tensor, token: Tensor) -> Tensor:
    """Which rows hide a token at one end, and show padding at the other."""
    ends = [(~shown & token)[:, end] & (shown & ~token)[:, -1 - end] for end in (0, -1)]
    return ends[0] | ends[1]


def _padding(ids: Tensor, mask: Any, pad: int | None, other: int) -> Tensor:
    there = torch.ones_like(ids, dtype=torch.bool)
    if isinstance(mask, Tensor) and mask.shape == ids.shape:
        there = mask.to(ids.device) != 0
    masked = _both(~there, other)
    if pad is not None:
        run = (ids == pad).flip(1).long().cumprod(1).flip(1) == 1
        masked |= _both(run, other)
    return masked


def _both(padding: Tensor, other: int) -> Tensor:
    """Places that are padding, and whose other one is padding too; a place without another one counts alone."""
    beside = padding.roll(-other, 1)
    if other:
        edge = -1 if other > 0 else 0
        beside[:, edge] = padding[:, edge]
    return padding & beside
