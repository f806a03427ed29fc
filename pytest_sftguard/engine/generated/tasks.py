"""Tasks: learnable rows for each task, and the collators that make batches of them."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pytest_sftguard.engine.generated.architectures import BOS, EOS, FRAMES, LABELS, MASK, MELS, PAD, PIXELS, VOCABULARY
from pytest_sftguard.engine.generated.axes import CAUSAL, CLASSIFY, IMAGES, MASKED, SEQ2SEQ, SPEECH, TAG

ROWS = 32
IGNORED = -100
_FIRST = 4
"""The first id that is no special token."""
_PACK = 24
"""Tokens of a packed row."""

Row = dict[str, Any]
Collate = Callable[[list[Row]], dict[str, Tensor]]


def rows(task: str, collator: str, *, first: bool = True) -> list[Row]:
    """The rows of a task; packed ones hold several texts each.

    Without `first`, the first token of a row of a causal model is no label: nothing predicts it.
    """
    draw = random.Random(0)
    made = [_MAKERS[task](draw) for _ in range(ROWS if collator != "packed" else 4 * ROWS)]
    made = _packed(made) if collator == "packed" else made
    return made if first or task != CAUSAL else [r | {"labels": [IGNORED, *r["labels"][1:]]} for r in made]


def collate(
    task: str, collator: str, decoder_start: int | None, dtype: torch.dtype, *, positions: bool = False
) -> Collate:
    """The collator of a task; `decoder_start` is the id that a decoder begins with, `dtype` that of images and speech.

    A model in half precision takes its images and its speech in the same type. With `positions`, rows that are padded
    on the left say where they begin.
    """
    if task == IMAGES:
        return lambda batch: {
            "pixel_values": torch.stack([torch.tensor(r["pixel_values"], dtype=dtype) for r in batch]),
            "labels": torch.tensor([r["labels"] for r in batch]),
        }
    if task == CLASSIFY:
        return lambda batch: _padded(batch, ("input_ids",)) | {"labels": torch.tensor([r["labels"] for r in batch])}
    if task == MASKED:
        return lambda batch: _masked(_padded(batch, ("input_ids",)))
    if task == SPEECH:
        return lambda batch: (
            {"input_features": torch.stack([torch.tensor(r["input_features"], dtype=dtype) for r in batch])}
            | _decoding(_padded(batch, ("labels",))["labels"], decoder_start)
        )
    if task == SEQ2SEQ:
        return lambda batch: (
            _padded(batch, ("input_ids",)) | _decoding(_padded(batch, ("labels",))["labels"], decoder_start)
        )
    if collator == "end to end":
        return _end_to_end
    left = collator == "padded on the left"
    padded = functools.partial(_padded, keys=("input_ids", "labels"), left=left)
    return (lambda batch: _with_positions(padded(batch))) if positions and left else padded


def _causal(draw: random.Random) -> Row:
    """A few ids, and an answer that says which of two groups the first one is of."""
    question = [draw.randrange(_FIRST + 2, VOCABULARY) for _ in range(draw.randint(3, 12))]
    answer = [_FIRST + (question[0] >= VOCABULARY // 2)] * draw.randint(1, 3)
    return {
        "input_ids": [BOS, *question, *answer, EOS],
        "labels": [IGNORED] * (1 + len(question)) + [*answer, EOS],
    }


def _classify(draw: random.Random) -> Row:
    ids = [draw.randrange(_FIRST, VOCABULARY) for _ in range(draw.randint(4, 14))]
    return {"input_ids": [BOS, *ids, EOS], "labels": int(ids[0] >= VOCABULARY // 2)}


def _tag(draw: random.Random) -> Row:
    ids = [draw.randrange(_FIRST, VOCABULARY) for _ in range(draw.randint(4, 14))]
    return {"input_ids": [BOS, *ids], "labels": [IGNORED, *(int(i >= VOCABULARY // 2) for i in ids)]}


def _repeated(draw: random.Random) -> Row:
    """Two ids in turn, so that a masked one can be told from its neighbours."""
    pair = [draw.randrange(_FIRST, VOCABULARY), draw.randrange(_FIRST, VOCABULARY)]
    return {"input_ids": [BOS, *pair * draw.randint(3, 6), EOS]}


def _seq2seq(draw: random.Random) -> Row:
    ids = [draw.randrange(_FIRST + 2, VOCABULARY) for _ in range(draw.randint(4, 12))]
    return {"input_ids": [*ids, EOS], "labels": [_FIRST + (ids[0] >= VOCABULARY // 2)] * draw.randint(1, 3) + [EOS]}


def _image(draw: random.Random) -> Row:
    label = draw.randrange(LABELS)
    pixels = [[[draw.gauss(2.0 * label - 1.0, 1.0) for _ in range(PIXELS)] for _ in range(PIXELS)] for _ in range(3)]
    return {"pixel_values": pixels, "labels": label}


def _speech(draw: random.Random) -> Row:
    label = draw.randrange(2)
    features = [[draw.gauss(2.0 * label - 1.0, 1.0) for _ in range(FRAMES)] for _ in range(MELS)]
    return {"input_features": features, "labels": [_FIRST + label] * draw.randint(1, 3) + [EOS]}


_MAKERS: dict[str, Callable[[random.Random], Row]] = {
    CAUSAL: _causal,
    CLASSIFY: _classify,
    TAG: _tag,
    MASKED: _repeated,
    SEQ2SEQ: _seq2seq,
    IMAGES: _image,
    SPEECH: _speech,
}


def _packed(made: list[Row]) -> list[Row]:
    """All texts one after the other, in rows of one length, as scripts without a mask between texts train."""
    ids = [i for row in made for i in row["input_ids"]]
    labels = [i for row in made for i in row["labels"]]
    starts = range(0, min(len(ids) - _PACK, ROWS * _PACK), _PACK)
    return [{"input_ids": ids[s : s + _PACK], "labels": labels[s : s + _PACK]} for s in starts]


def _padded(batch: list[Row], keys: tuple[str, ...], *, left: bool = False) -> dict[str, Tensor]:
    """The rows as tensors of shape (rows, tokens), with a mask of their ids."""
    made: dict[str, Tensor] = {}
    for key in keys:
        longest = max(len(r[key]) for r in batch)
        fill = IGNORED if key == "labels" else PAD
        sides = [([fill] * (longest - len(r[key])), r[key]) for r in batch]
        made[key] = torch.tensor([[*pad, *ids] if left else [*ids, *pad] for pad, ids in sides])
        if key == "input_ids":
            masks = [([0] * len(pad), [1] * len(ids)) for pad, ids in sides]
            made["attention_mask"] = torch.tensor([[*a, *b] if left else [*b, *a] for a, b in masks])
    return made


def _with_positions(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """With the positions of all tokens, from 0 at the first one of each row."""
    return batch | {"position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)}


def _masked(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every third token of a row hidden, from a place that the row's first id gives; the labels are what was hidden."""
    ids = batch["input_ids"]
    places = torch.arange(ids.shape[1]).expand_as(ids)
    hidden = ((places + ids[:, 1:2]) % 3 == 0) & (ids >= _FIRST)
    return batch | {
        "input_ids": torch.where(hidden, MASK, ids),
        "labels": torch.where(hidden, ids, IGNORED),
    }


def _decoding(labels: Tensor, start: int | None) -> dict[str, Tensor]:
    """Labels, and what a decoder is given for them: itself one token late."""
    shifted = labels.roll(1, 1)
    shifted[:, 0] = PAD if start is None else start
    return {"labels": labels, "decoder_input_ids": torch.where(shifted == IGNORED, PAD, shifted)}


def _end_to_end(batch: list[Row]) -> dict[str, Tensor]:
    """One row of all tokens without padding, in which positions start again with each text."""
    ids = [i for r in batch for i in r["input_ids"]]
    # the first token of a text does not follow from the text before it
    labels = [i for r in batch for i in (IGNORED, *r["labels"][1:])]
    positions = [p for r in batch for p in range(len(r["input_ids"]))]
    return {
        "input_ids": torch.tensor([ids]),
        "labels": torch.tensor([labels]),
        "position_ids": torch.tensor([positions]),
    }
