"""Rows about other values: right, and none that the validation asks."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from homework.augment import augmented
from homework.data import TRAIN_FILE, VALID_FILE, read_rows
from homework.questions import triple_of
from homework.units import convert

TRAIN, VALID = read_rows(TRAIN_FILE), read_rows(VALID_FILE)


def value_of(question: str) -> float:
    """The number that stands alone in a question."""
    found = re.search(r"(?<![\w.*])[0-9]+(?:\.[0-9]+)?(?![\w.*])", question)
    assert found is not None
    return float(found[0])


@given(seed=st.integers(0, 2**32 - 1))
def test_every_row_is_right(seed: int) -> None:
    """By pint's own conversion, for whatever value was drawn; the file's rows stand first, as they are."""
    rows = augmented(TRAIN[:40], VALID, 3, seed)
    assert rows[:40] == TRAIN[:40]
    for (question, answer), (original, _) in zip(rows, TRAIN[:40] * 3, strict=True):
        triple = triple_of(original)
        assert triple is not None
        assert answer == pytest.approx(convert(value_of(question), *triple[1:]), rel=1e-8)


def test_nothing_is_told_that_the_validation_asks() -> None:
    """In neither direction, in twelve thousand rows."""
    asked = {triple_of(question) for question, _ in VALID}
    rows = augmented(TRAIN, VALID, 12, 11)
    assert len(rows) == 12_000
    told = {triple_of(question) for question, _ in rows}
    assert not asked & told
    made = {triple_of(question) for question, _ in rows[len(TRAIN) :]} - {triple_of(question) for question, _ in TRAIN}
    mirrors = {(f"{answer:.8e}", t[2], t[1]) for question, answer in VALID if (t := triple_of(question))}
    assert not mirrors & {(f"{t[0]:.8e}", t[1], t[2]) for t in made if t}


def test_a_seed_gives_the_same_rows() -> None:
    """And another one gives others."""
    first, again, other = (augmented(TRAIN[:50], VALID, 4, seed) for seed in (1, 1, 2))
    assert first == again != other


def test_a_question_of_another_form_stays_as_it_is() -> None:
    """Nothing is known of what its number means."""
    rows = [("What is 3 plus 4?", 7.0), ("Water boils at 100 degrees; in kelvin?", 373.15)]
    assert augmented(rows, VALID, 3, 0) == rows * 3
