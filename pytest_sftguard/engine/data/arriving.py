"""Rows of a data set found again in the micro-batch that was made of them, and compared with it place by place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pytest_sftguard.engine.data.rows import IGNORED

Ids = NDArray[np.int64]
NO_ID = -1
"""Stands for an id that is not known: no token has it."""

_ADDED = 2
"""Special tokens that a collator may put at either end of a row."""
_ALIKE = 0.5
"""Share of tokens that must be equal for a row of the same length to be the same row, changed. Of tokens that follow
from nothing, few are equal by chance."""


@dataclass(frozen=True)
class Feature:
    """One row of the data set, as the collator was given it."""

    ids: Ids
    """Token ids, shape (tokens,); empty if it brings none, such as a row of speech."""
    mask: Ids | None = None
    """Its own attention mask, shape (tokens,); None if it brings none."""
    labels: Ids | None = None
    """Its own labels, shape (labels,), or shape () for one label of the whole row; None if it brings none."""

    @classmethod
    def of(cls, item: Any) -> Feature | None:
        """A copy of `item`, which a collator may change; None if it has no sequence of token ids or of labels."""
        if not isinstance(item, Mapping):
            return None
        mask = _numbers(item.get("attention_mask"))
        labels = next((v for k in ("labels", "label", "label_ids") if (v := _numbers(item.get(k))) is not None), None)
        ids = _numbers(item["input_ids"]) if "input_ids" in item else np.empty(0, np.int64)
        if ids is None or ids.ndim != 1 or (not len(ids) and (labels is None or labels.ndim != 1)):
            return None
        return cls(ids, mask if mask is not None and mask.shape == ids.shape else None, labels)

    def inside(self, pad: int) -> Feature:
        """The row without padding of its own at either end."""
        kept = self.mask != 0 if self.mask is not None else self.ids != pad
        there = np.flatnonzero(kept)
        whole = slice(int(there[0]), int(there[-1]) + 1) if len(there) else slice(0, 0)
        beside = self.labels is not None and self.labels.shape == self.ids.shape
        return Feature(
            self.ids[whole],
            None if self.mask is None else self.mask[whole],
            self.labels[whole] if beside and self.labels is not None else self.labels,
        )


@dataclass(frozen=True)
class Given:
    """The inputs of one micro-batch."""

    ids: Ids
    """Token ids, shape (rows, tokens); of no tokens if there are none."""
    mask: Ids | None
    """Attention mask of the same shape; None if there is none of this shape."""
    labels: Ids | None
    """Labels, shape (rows, labels) or (rows,); None if there are none in whole numbers."""


@dataclass(frozen=True)
class Facts:
    """What the tokens mean, and what the model does with them."""

    pad: int
    """The padding id, or `NO_ID`."""
    separate_pad: bool
    """Whether no sequence ends or begins in the padding id."""
    special: frozenset[int]
    """Ids that a collator may add to a row; the padding id is not one of them if it is separate."""
    causal: bool
    """Whether tokens to the right of a row cannot matter to it."""
    decodes: bool
    """Whether the labels belong to a decoder of its own, with other places than the token ids."""


@dataclass(frozen=True)
class Deviation:
    """What differs in one row of a micro-batch."""

    name: str
    """`ids`, `replaced`, `mask`, `padding` or `labels`."""
    row: int
    """Row of the micro-batch, from 0."""
    place: int
    """First place of that row that differs, from 0."""
    places: int
    """Number of places that differ."""
    compared: int
    """Number of places that were compared."""
    found: int
    """What is at the first of them."""
    expected: int
    """What should be there."""


@dataclass
class Comparison:
    """What came of the rows of one micro-batch."""

    arrived: int = 0
    """Rows whose tokens are all there, or truncated at an end."""
    unknown: int = 0
    """Rows that are not found in the micro-batch."""
    deviations: list[Deviation] = field(default_factory=list)
    """What differs, at most once of each name for a row."""
    shifted: list[Deviation] = field(default_factory=list)
    """What differs in the labels if each is that of the next place."""
    classes: list[Deviation] = field(default_factory=list)
    """Rows that have one label in the data set and in the micro-batch, whether they differ or not."""


@dataclass(frozen=True)
class _Place:
    """Where a part of a row lies in a micro-batch, flattened or not."""

    row: int
    start: int
    begin: int
    end: int
    whole: bool = True

    @property
    def stop(self) -> int:
        return self.start + self.end - self.begin


def compared(features: Sequence[Feature], given: Given, facts: Facts) -> Comparison:
    """Compare the rows `features` with the micro-batch that was made of them."""
    inside = [f.inside(facts.pad if facts.separate_pad else NO_ID) for f in features]
    result = Comparison()
    if not given.ids.shape[1]:
        _of_decoders(result, inside, given, facts)
        return result
    padded = len(inside) == len(given.ids)
    places = _in_rows(inside, given, facts) if padded else _in_packs(inside, given)
    if not padded:
        flat = [None if a is None else a.reshape(1, -1) for a in (given.mask, given.labels)]
        same = given.labels is not None and given.labels.shape == given.ids.shape
        given = Given(given.ids.reshape(1, -1), flat[0], flat[1] if same else None)
    for feature, place in zip(inside, places, strict=True):
        if not len(feature.ids):
            continue
        if place is None:
            result.unknown += 1
            continue
        if place.whole:
            result.arrived += 1
        else:
            changed = _of_ids(feature, place, given)
            if changed is None:
                result.arrived += 1
            else:
                result.deviations.append(changed)
                if changed.name == "replaced":
                    continue
        result.deviations += _of_mask(feature, place, given, facts, padded=padded)
        _of_labels(result, feature, place, given, facts)
    return result


def _in_rows(features: Sequence[Feature], given: Given, facts: Facts) -> list[_Place | None]:
    """Places of rows of which each has one row of the micro-batch, in any order."""
    contents = [_content(given, row, facts) for row in range(len(given.ids))]
    found: list[_Place | None] = [None] * len(features)
    free = set(range(len(features)))

    def find(search: Callable[[Ids, int], _Place | None], *, elsewhere: bool) -> None:
        """Settle the rows that `search` finds: each in its own row of the micro-batch if it is there."""
        for others in (False, True) if elsewhere else (False,):
            for i in [n for n, place in enumerate(found) if place is None]:
                rows = sorted(free) if others else sorted(free & {i})
                found[i] = next((p for row in rows if (p := search(features[i].ids, row)) is not None), None)
                free.difference_update({p.row for p in found if p is not None})

    find(lambda ids, row: _alone(ids, given.ids[row], row, contents[row], facts), elsewhere=True)
    find(lambda ids, row: _part(ids, given.ids[row], row, contents[row], facts), elsewhere=True)
    find(lambda ids, row: _changed(ids, given.ids[row], row, contents[row], _ALIKE), elsewhere=True)
    # in their own order, a row of which next to nothing is left is known by its place
    if all(place is None or place.row == i for i, place in enumerate(found)):
        find(lambda ids, row: _changed(ids, given.ids[row], row, contents[row], 0.0), elsewhere=False)
    return found


def _content(given: Given, row: int, facts: Facts) -> slice:
    """The places of a row between padding, by the mask, or without one by the ids."""
    kept = given.mask[row] != 0 if given.mask is not None else given.ids[row] != facts.pad
    there = np.flatnonzero(kept)
    return slice(int(there[0]), int(there[-1]) + 1) if len(there) else slice(0, 0)


def _alone(ids: Ids, within: Ids, row: int, content: slice, facts: Facts) -> _Place | None:
    """Where all of `ids` lie in a row that holds nothing else but padding and special tokens."""
    for start in _starts(ids, within):
        stop = start + len(ids)
        rest = [*within[content.start : start].tolist(), *within[stop : content.stop].tolist()]
        if all(i in facts.special or i == facts.pad for i in rest):
            return _Place(row, start, 0, len(ids))
    return None


def _part(ids: Ids, within: Ids, row: int, content: slice, facts: Facts) -> _Place | None:
    """Where `ids` lie in a longer row, or truncated at an end."""
    start = next(_starts(ids, within), None)
    if start is not None:
        return _Place(row, start, 0, len(ids))
    own = within[content]
    before, after = _added(own, facts), _added(own[::-1], facts)
    core = own[before : len(own) - after]
    begin = next(_starts(core, ids), None) if len(core) else None
    if begin is not None and len(core) < len(ids):
        return _Place(row, content.start + before, begin, begin + len(core))
    return None


def _changed(ids: Ids, within: Ids, row: int, content: slice, alike: float) -> _Place | None:
    """Where `ids` lie in a row of as many tokens, of which the share `alike` at least is equal."""
    own = within[content]
    if not len(ids) or len(own) != len(ids) or not np.mean(own == ids) >= alike:
        return None
    return _Place(row, content.start, 0, len(ids), whole=False)


def _added(own: Ids, facts: Facts) -> int:
    """Number of special tokens that `own` begins with, as far as a collator may have added them."""
    count = 0
    while count < min(_ADDED, len(own)) and int(own[count]) in facts.special:
        count += 1
    return count


def _in_packs(features: Sequence[Feature], given: Given) -> list[_Place | None]:
    """Places of rows that lie one after the other, in the flattened micro-batch."""
    flat = given.ids.reshape(-1)
    found: list[_Place | None] = []
    after: int | None = 0
    for feature in features:
        ids = feature.ids
        start = next(_starts(ids, flat, after or 0), None)
        start = next(_starts(ids, flat), None) if start is None else start
        place = None if start is None else _Place(0, start, 0, len(ids))
        if place is None and after is not None:
            there = flat[after : after + len(ids)]
            if len(there) and np.array_equal(there, ids[: len(there)]):
                # the end of the last row does not fit
                place = _Place(0, after, 0, len(there))
            elif len(there) == len(ids) and np.mean(there == ids) >= _ALIKE:
                place = _Place(0, after, 0, len(ids), whole=False)
        found.append(place)
        after = None if place is None else place.stop
    return found


def _starts(ids: Ids, within: Ids, first: int = 0) -> Iterator[int]:
    """Where `ids` lie in `within` as one run, from the place `first` on."""
    sought, text, size = ids.tobytes(), within.tobytes(), within.itemsize
    at = text.find(sought, first * size) if sought else -1
    while at >= 0:
        if at % size == 0:
            yield at // size
        at = text.find(sought, at + 1)


def _of_ids(feature: Feature, place: _Place, given: Given) -> Deviation | None:
    there = given.ids[place.row, place.start : place.stop]
    # ids that no embedding has stand for something that the collator puts in their place
    differs = (there != feature.ids) & (feature.ids >= 0)
    found = _deviation("ids", place, differs, there, feature.ids)
    if found is not None and not np.mean(~differs) >= _ALIKE:
        return replace(found, name="replaced")
    return found


def _deviation(name: str, place: _Place, differs: Any, found: Ids, expected: Ids) -> Deviation | None:
    where = np.flatnonzero(differs)
    if not len(where):
        return None
    first = int(where[0])
    values = int(found[first]), int(expected[first])
    return Deviation(name, place.row, place.start + first, len(where), len(differs), *values)


def _of_mask(feature: Feature, place: _Place, given: Given, facts: Facts, *, padded: bool) -> Iterator[Deviation]:
    if given.mask is None:
        return
    there = given.mask[place.row, place.start : place.stop] != 0
    ids = feature.ids[place.begin : place.end]
    if feature.mask is not None:
        expected = feature.mask[place.begin : place.end] != 0
        differs = there != expected
    else:
        # where the padding id also ends sequences, many collators leave out every one of it
        expected = np.ones_like(there)
        differs = (there != expected) & (ids != facts.pad)
    found = _deviation("mask", place, differs, there.astype(np.int64), expected.astype(np.int64))
    if found is not None:
        yield found
    if not padded or not place.whole:
        return
    row, mask = given.ids[place.row], given.mask[place.row] != 0
    # what stands to the right of a row cannot matter to a model that is causal
    sides = [slice(0, place.start)] + ([] if facts.causal else [slice(place.stop, len(row))])
    for side in sides:
        attended = mask[side] & (row[side] == facts.pad)
        if not facts.separate_pad and len(attended):
            # the first one may be a token that begins or ends the row
            attended[-1 if side.start == 0 else 0] = False
        if len(attended) and (row[side] == facts.pad).all():
            at = replace(place, start=side.start)
            padding = _deviation("padding", at, attended, mask[side].astype(np.int64), np.zeros(len(attended), int))
            if padding is not None:
                yield padding
                return


def _of_labels(result: Comparison, feature: Feature, place: _Place, given: Given, facts: Facts) -> None:
    """Compare the labels of a row, if there is something to compare them with."""
    labels, own = given.labels, feature.labels
    if labels is None:
        return
    if labels.ndim == 1:
        if own is not None and own.ndim == 0 and len(labels) == len(given.ids):
            given_class = int(labels[place.row])
            result.classes.append(Deviation("labels", place.row, 0, 1, 1, given_class, int(own)))
    elif facts.decodes:
        if own is not None and own.ndim == 1 and len(labels) == len(given.ids):
            result.deviations += _listed(_of_decoder(place.row, labels[place.row], _supervised(own), facts))
    elif labels.shape == given.ids.shape:
        beside = own is not None and own.shape == feature.ids.shape
        if not beside and not facts.causal:
            return
        there = labels[place.row, place.start : place.stop]
        ids = feature.ids[place.begin : place.end]
        wanted = own[place.begin : place.end] if beside and own is not None else ids
        # labels that mask nothing are the ids once more, of which a collator may mask the prompt
        free = there == IGNORED
        if beside and own is not None and (own == IGNORED).any():
            free = free & (ids == facts.pad)
            # nothing predicts the first token of a row
            free[:1] = there[:1] == IGNORED
        result.deviations += _listed(_deviation("labels", place, (there != wanted) & ~free, there, wanted))
        following = np.append(wanted[1:], there[-1:])
        late = (there != following) & ~((there == IGNORED) & free)
        result.shifted += _listed(_deviation("labels", place, late, there, following))


def _of_decoders(result: Comparison, features: Sequence[Feature], given: Given, facts: Facts) -> None:
    """Compare the labels of rows that have no token ids, in any order."""
    labels = given.labels
    if labels is None or labels.ndim != 2 or len(labels) != len(features):
        return
    free, missing = set(range(len(labels))), []
    for i, feature in enumerate(features):
        rows = [i, *sorted(free)]
        row = next((r for r in rows if r in free and _decodes(labels[r], _supervised(feature.labels), facts)), None)
        if row is None:
            missing.append(i)
        else:
            free.discard(row)
            result.arrived += 1
    for i in missing:
        wrong = _of_decoder(i, labels[i], _supervised(features[i].labels), facts) if i in free else None
        result.unknown += wrong is None
        result.deviations += _listed(wrong)


def _supervised(own: Ids | None) -> Ids:
    """The labels of a row for a decoder, without those after the last that counts."""
    if own is None or own.ndim != 1 or not (own != IGNORED).any():
        return np.empty(0, np.int64)
    return own[: int(np.flatnonzero(own != IGNORED)[-1]) + 1]


def _within(there: Ids, facts: Facts) -> slice:
    """The places of labels that count, between padding."""
    counted = np.flatnonzero((there != IGNORED) & (there != facts.pad))
    return slice(int(counted[0]), int(counted[-1]) + 1) if len(counted) else slice(0, 0)


def _decodes(there: Ids, wanted: Ids, facts: Facts) -> bool:
    """Whether the labels of a micro-batch's row are those of a row, which may be truncated."""
    if not len(wanted) or next(_starts(wanted, there), None) is not None:
        return True
    content = there[_within(there, facts)]
    return 0 < len(content) < len(wanted) and next(_starts(content, wanted), None) is not None


def _of_decoder(row: int, there: Ids, wanted: Ids, facts: Facts) -> Deviation | None:
    """The labels of a row for a decoder that differ from those `wanted`; None where too few are equal to tell."""
    if _decodes(there, wanted, facts):
        return None
    content = _within(there, facts)
    start = content.start if content.stop - content.start == len(wanted) else 0
    seen = there[start : start + len(wanted)]
    if len(seen) < len(wanted) or not np.mean(seen == wanted) >= _ALIKE:
        return None
    return _deviation("labels", _Place(row, start, 0, len(wanted)), seen != wanted, seen, wanted)


def _listed(found: Deviation | None) -> list[Deviation]:
    return [] if found is None else [found]


def _numbers(value: Any) -> Ids | None:
    """A copy of whole numbers on the host as an array; None for anything else."""
    if value is None or isinstance(value, (str, bytes, Mapping)):
        return None
    if getattr(getattr(value, "device", None), "type", "cpu") != "cpu":
        return None
    try:
        made = np.array(value)
    # ragged lists, and whatever else a row may hold
    except (ValueError, TypeError, RuntimeError):
        return None
    return made.astype(np.int64) if made.dtype.char in "?bBhHiIlLqQ" else None
