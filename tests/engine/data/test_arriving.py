"""Rows that are found again in a micro-batch, and what of them differs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_sftguard.engine.data.arriving import NO_ID, Comparison, Facts, Feature, Given, compared

PAD, BOS, EOS = 0, 1, 2
CAUSAL = Facts(PAD, separate_pad=True, special=frozenset({BOS, EOS}), causal=True, decodes=False)
IN_PLACE = Facts(PAD, separate_pad=True, special=frozenset({BOS, EOS}), causal=False, decodes=False)
DECODER = Facts(PAD, separate_pad=True, special=frozenset({BOS, EOS}), causal=False, decodes=True)
SHARED = Facts(EOS, separate_pad=False, special=frozenset({BOS, EOS}), causal=True, decodes=False)
ROWS = [[BOS, 11, 12, 13, 14, EOS], [BOS, 21, 22, EOS], [BOS, 31, 32, 33, EOS]]
LABELS = [[-100, -100, -100, 13, 14, EOS], [-100, -100, 22, EOS], [-100, -100, 32, 33, EOS]]


def features(rows: list[list[int]] = ROWS, labels: list[list[int]] | None = LABELS) -> list[Feature]:
    """The rows as a data set has them."""
    items = [{"input_ids": ids} | ({} if labels is None else {"labels": labels[i]}) for i, ids in enumerate(rows)]
    return [f for f in map(Feature.of, items) if f is not None]


def filled(rows: list[list[int]], fill: int, *, left: bool = False, width: int | None = None) -> Any:
    """The rows as one array, padded."""
    longest = max(map(len, rows)) if width is None else width
    padding = [[fill] * (longest - len(r)) for r in rows]
    return np.array([[*p, *r] if left else [*r, *p] for p, r in zip(padding, rows, strict=True)], dtype=np.int64)


def batch(rows: list[list[int]] = ROWS, labels: list[list[int]] = LABELS, *, left: bool = False) -> Given:
    """A micro-batch of the rows."""
    return Given(
        filled(rows, PAD, left=left),
        filled([[1] * len(r) for r in rows], 0, left=left),
        filled(labels, -100, left=left),
    )


def joined(rows: list[list[int]]) -> list[int]:
    """The rows end to end."""
    return [i for row in rows for i in row]


def names(comparison: Comparison) -> list[str]:
    """What differs."""
    return [d.name for d in comparison.deviations]


@st.composite
def texts(draw: st.DrawFn) -> list[list[int]]:
    """Rows of ids that are no special tokens, each between a first and a last one."""
    inner = st.lists(st.integers(3, 40), min_size=2, max_size=12)
    return [[BOS, *row, EOS] for row in draw(st.lists(inner, min_size=1, max_size=5))]


@given(rows=texts(), left=st.booleans(), data=st.data())
def test_padded_rows_arrive_in_any_order(rows: list[list[int]], left: bool, data: st.DataObject) -> None:
    """On either side, and whichever row comes first."""
    order = data.draw(st.permutations(range(len(rows))))
    found = compared(features(rows, rows), batch([rows[i] for i in order], [rows[i] for i in order], left=left), CAUSAL)
    assert (found.arrived, found.unknown, found.deviations) == (len(rows), 0, [])


@given(rows=texts(), data=st.data())
def test_one_changed_token_is_seen(rows: list[list[int]], data: st.DataObject) -> None:
    """Whichever it is, unless a special token takes the place of one at an end."""
    row = data.draw(st.integers(0, len(rows) - 1))
    place = data.draw(st.integers(1, len(rows[row]) - 2))
    changed = [list(r) for r in rows]
    changed[row][place] = 50
    found = compared(features(rows, None), batch(changed, rows), CAUSAL)
    assert [(d.name, d.place, d.places, d.found) for d in found.deviations if d.name == "ids"] == [
        ("ids", place, 1, 50)
    ]


@given(rows=texts(), left=st.booleans(), data=st.data())
def test_one_hidden_token_is_seen(rows: list[list[int]], left: bool, data: st.DataObject) -> None:
    """Whichever it is."""
    row = data.draw(st.integers(0, len(rows) - 1))
    made = batch(rows, rows, left=left)
    assert made.mask is not None
    there = np.flatnonzero(made.mask[row])
    place = int(there[data.draw(st.integers(0, len(there) - 1))])
    made.mask[row, place] = 0
    [found] = compared(features(rows, rows), made, CAUSAL).deviations
    assert (found.name, found.row, found.place, found.places, found.expected) == ("mask", row, place, 1, 1)


@given(rows=texts(), data=st.data())
def test_one_changed_label_is_seen(rows: list[list[int]], data: st.DataObject) -> None:
    """Whichever it is, but for the first, which nothing predicts."""
    row = data.draw(st.integers(0, len(rows) - 1))
    own = [[-100, -100, *r[2:]] for r in rows]
    place = data.draw(st.integers(1, len(rows[row]) - 1))
    changed = [list(r) for r in own]
    changed[row][place] = 50 if place % 2 or own[row][place] == -100 else -100
    [found] = compared(features(rows, own), batch(rows, changed), CAUSAL).deviations
    assert (found.name, found.row, found.place, found.expected) == ("labels", row, place, own[row][place])


@given(rows=texts(), data=st.data())
def test_truncated_rows_arrive(rows: list[list[int]], data: st.DataObject) -> None:
    """At their ends, with or without an end token in the last place."""
    width = data.draw(st.integers(2, max(map(len, rows))))
    short = [r[:width] for r in rows]
    if data.draw(st.booleans()):
        short = [[*s[:-1], EOS] if len(s) < len(r) else s for s, r in zip(short, rows, strict=True)]
    ids = [s for s in short if len(s) > 2]
    own = [r for s, r in zip(short, rows, strict=True) if len(s) > 2]
    if ids:
        found = compared(features(own, None), Given(batch(ids, ids).ids, batch(ids, ids).mask, None), CAUSAL)
        assert (found.arrived, found.deviations) == (len(own), [])


@given(rows=texts(), start=st.booleans(), end=st.booleans())
def test_added_special_tokens_are_sound(rows: list[list[int]], start: bool, end: bool) -> None:
    """At either end of a row that has none."""
    bare = [r[1:-1] for r in rows]
    longer = [[BOS] * start + r + [EOS] * end for r in bare]
    assert names(compared(features(bare, None), batch(longer, longer), CAUSAL)) == []


@given(rows=texts())
def test_rows_end_to_end_arrive(rows: list[list[int]]) -> None:
    """Flattened into one row, with labels that leave out the first token of each."""
    own = [[-100, *r[1:]] for r in rows]
    flat = Given(np.array([joined(rows)]), None, np.array([joined(own)]))
    found = compared(features(rows, rows), flat, CAUSAL)
    assert (found.arrived, found.unknown, names(found)) == (len(rows), 0, [])


def test_a_token_changed_in_a_pack_is_seen() -> None:
    """The row lies between its neighbours."""
    flat = joined(ROWS)
    flat[2] = 50
    found = compared(features(labels=None), Given(np.array([flat]), None, None), CAUSAL)
    assert [(d.name, d.place) for d in found.deviations] == [("ids", 2)]


def test_tokens_of_another_row_are_seen() -> None:
    """A row of the right length, with tokens of its own in none of the places that are its own."""
    rows = [[BOS, 50, 51, 52, 53, 54], *ROWS[1:]]
    found = compared(features(), batch(rows, rows), CAUSAL)
    assert (found.arrived, names(found)[0]) == (2, "replaced")


def test_a_row_of_another_length_is_not_judged() -> None:
    """A collator that puts further tokens into the middle makes another row."""
    rows = [[BOS, 11, 12, 50, 51, 13, 14, EOS], *ROWS[1:]]
    found = compared(features(), batch(rows, [rows[0], *LABELS[1:]]), CAUSAL)
    assert (found.arrived, found.unknown, names(found)) == (2, 1, [])


def test_placeholders_may_be_replaced() -> None:
    """An id below zero has no embedding."""
    rows = [[BOS, -200, 12, 13, 14, EOS], *ROWS[1:]]
    given_rows = [[BOS, 3, 12, 13, 14, EOS], *ROWS[1:]]
    assert names(compared(features(rows), batch(given_rows), CAUSAL)) == []


@pytest.mark.parametrize(("left", "facts", "found"), [(True, CAUSAL, 1), (False, CAUSAL, 0), (False, IN_PLACE, 1)])
def test_attended_padding_is_seen_where_it_matters(left: bool, facts: Facts, found: int) -> None:
    """Before a row always; after it only where the model looks ahead."""
    made = batch(left=left)
    assert made.mask is not None
    made.mask[:] = 1
    assert names(compared(features(labels=None), Given(made.ids, made.mask, None), facts)) == ["padding"] * 2 * found


def test_an_end_token_that_is_the_padding_too_may_be_left_out() -> None:
    """Many collators make mask and labels of the ids."""
    ids = filled(ROWS, EOS)
    made = Given(ids, (ids != EOS).astype(np.int64), np.where(ids != EOS, ids, -100))
    assert names(compared(features(labels=ROWS), made, SHARED)) == []


def test_the_rows_own_mask_counts() -> None:
    """A token that the row itself hides must stay hidden."""
    own = Feature.of({"input_ids": ROWS[0], "attention_mask": [1, 1, 0, 1, 1, 1]})
    assert own is not None
    ids, seen = np.array([ROWS[0]]), np.ones((1, 6), np.int64)
    assert names(compared([own], Given(ids, seen, None), CAUSAL)) == ["mask"]
    seen[0, 2] = 0
    assert names(compared([own], Given(ids, seen, None), CAUSAL)) == []


def test_a_prompt_may_be_masked_where_the_row_masks_nothing() -> None:
    """Labels that are the ids once more say nothing about the prompt; those with a mask of their own do."""
    assert names(compared(features(labels=ROWS), batch(), CAUSAL)) == []
    assert names(compared(features(), batch(labels=ROWS), CAUSAL)) == ["labels"] * 3


def test_shifted_labels_are_those_of_the_next_place() -> None:
    """They differ in their own places, and agree with the next ones."""
    late = [[*r[1:], -100] for r in LABELS]
    found = compared(features(), batch(labels=late), CAUSAL)
    assert len(found.deviations) == 3
    assert found.shifted == []


@pytest.mark.parametrize(
    ("given_labels", "found"),
    [
        ([[41, 42, 43, EOS], [51, EOS, -100, -100]], 0),
        ([[41, 42, EOS, -100], [51, EOS, -100, -100]], 1),
        ([[41, 42, 43, -100], [51, EOS, -100, -100]], 0),
        ([[41, -100, 43, EOS], [51, EOS, -100, -100]], 1),
    ],
)
@pytest.mark.parametrize("speech", [False, True])
def test_labels_of_a_decoder(given_labels: list[list[int]], found: int, speech: bool) -> None:
    """They are the row's own, padded or truncated, with token ids beside them or without."""
    own = [[41, 42, 43, EOS], [51, EOS]]
    rows = [{"labels": o} if speech else {"input_ids": r, "labels": o} for o, r in zip(own, ROWS, strict=False)]
    ids = np.empty((0, 0), np.int64) if speech else filled(ROWS[:2], PAD)
    made = Given(ids, None, np.array(given_labels))
    assert names(compared([f for f in map(Feature.of, rows) if f is not None], made, DECODER)) == ["labels"] * found


def test_without_a_known_padding_id_the_mask_tells() -> None:
    """The rows are found all the same."""
    facts = Facts(NO_ID, separate_pad=False, special=frozenset(), causal=True, decodes=False)
    assert compared(features(), batch(), facts).arrived == 3


@pytest.mark.parametrize("item", [None, "text", {}, {"input_ids": [[1, 2]]}, {"input_ids": "text"}, {"labels": 1}])
def test_what_holds_no_ids_is_no_row(item: Any) -> None:
    """Texts, several sequences, one class."""
    assert Feature.of(item) is None
