"""Rows of token ids and labels, from the micro-batches that were trained on and from the data set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from torch import Tensor

from pytest_sftguard.engine.recording.watching import STEP

IGNORED = -100
"""The label of a token that the loss ignores."""
_SAMPLE = 256
"""Rows read from a data set, evenly spread: they miss a fault in 5 % of all rows once in half a million runs."""


@dataclass(frozen=True)
class Row:
    """One row without its padding."""

    ids: tuple[int, ...]
    """Token ids."""
    labels: tuple[int, ...] | None
    """One label per token; None where the row has no such labels."""
    starts: tuple[int, ...] = (0,)
    """Places where the sequences packed into the row begin, by its position ids."""

    @property
    def first_label(self) -> int:
        """Place of the first label that is not ignored; the length of the row where all are."""
        return next((i for i, label in enumerate(self.labels or ()) if label != IGNORED), len(self.ids))

    @property
    def prompt(self) -> tuple[int, ...]:
        """The ids before the first label that is not ignored."""
        return self.ids[: self.first_label]

    @property
    def answer(self) -> tuple[int, ...]:
        """The labels from the first that is not ignored to the next that is."""
        return tuple(takewhile(lambda label: label != IGNORED, (self.labels or ())[self.first_label :]))


def micro_batches(batches: Iterable[Mapping[str, Any]], pad: int | None = None) -> list[tuple[int, list[Row]]]:
    """Return the rows of those `batches` that hold token ids, each with its optimizer step, from 1.

    Where there is no mask, `pad` is stripped from both ends of a row.
    """
    found = []
    for batch in batches:
        ids = batch.get("input_ids")
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
            continue
        beside = (_beside(batch.get(k), ids) for k in ("attention_mask", "labels", "position_ids"))
        rows = [_row(pad, *columns) for columns in zip(ids.tolist(), *beside, strict=True)]
        found.append((int(batch[STEP]), rows))
    return found


def sample(dataset: Any, pad: int | None = None) -> list[Row]:
    """Return rows of a data set of token ids, evenly spread; none of a stream, which cannot be read in any order."""
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        return []
    count = len(dataset)
    wanted = range(count) if count <= _SAMPLE else [i * count // _SAMPLE for i in range(_SAMPLE)]
    rows = []
    for i in wanted:
        item = dataset[i]
        if not isinstance(item, Mapping):
            return []
        ids, mask, labels = (_listed(item.get(k)) for k in ("input_ids", "attention_mask", "labels"))
        if ids is None:
            return []
        same = [part if part is not None and len(part) == len(ids) else None for part in (mask, labels)]
        rows.append(_row(pad, ids, *same))
    return rows


def _row(
    pad: int | None, ids: Sequence[int], mask: Sequence[Any] | None, labels: Sequence[int] | None, places: Any = None
) -> Row:
    if mask is None:
        bare = [i != pad or (labels is not None and labels[k] != IGNORED) for k, i in enumerate(ids)]
        inside = [k for k, kept in enumerate(bare) if kept]
        kept = list(range(inside[0], inside[-1] + 1)) if inside else []
    else:
        kept = [k for k, m in enumerate(mask) if m]
    starts = [n for n, k in enumerate(kept) if places is not None and places[k] == 0]
    return Row(
        tuple(int(ids[k]) for k in kept),
        None if labels is None else tuple(int(labels[k]) for k in kept),
        tuple(starts) if len(starts) > 1 else (0,),
    )


def _beside(value: Any, ids: Tensor) -> list[Any]:
    """Return one list per row where `value` holds whole numbers in the shape of `ids`; else None per row."""
    fits = isinstance(value, Tensor) and value.shape == ids.shape and not value.is_floating_point()
    return value.tolist() if fits else [None] * len(ids)


def _listed(value: Any) -> list[Any] | None:
    """Return `value` as a flat list of whole numbers; None where it is something else."""
    plain = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(plain, (list, tuple)) or not all(isinstance(v, int) for v in plain):
        return None
    return list(plain)
