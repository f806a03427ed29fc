"""Tables of conversions: right, whole, and nothing in them that the validation asks."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from homework.task.data import TRAIN_FILE, VALID_FILE, read_rows
from homework.task.questions import about, ask, triple_of
from homework.task.tables import with_tables
from homework.task.units import FAMILIES, Triple, convert

TRAIN, VALID = read_rows(TRAIN_FILE), read_rows(VALID_FILE)
PAIRS = {triple[1:] for question, _ in TRAIN if (triple := triple_of(question))}


def triples(rows: list[tuple[str, float]]) -> list[Triple]:
    """What the rows are about; every one of them must be a question of the app's."""
    found = [triple_of(question) for question, _ in rows]
    assert None not in found
    return [triple for triple in found if triple is not None]


@given(seed=st.integers(0, 2**32 - 1))
def test_every_row_is_right(seed: int) -> None:
    """By pint's own conversion; the file's rows stand first, as they are."""
    rows = with_tables(TRAIN[:40], VALID, 2, seed)
    assert rows[:40] == TRAIN[:40]
    for (_, answer), triple in zip(rows, triples(rows), strict=True):
        assert answer == pytest.approx(convert(*triple), rel=1e-8)


def test_a_table_has_ten_values_or_their_tenfolds() -> None:
    """Each pair of units of the file, each of its ten values, each as often as asked for."""
    made = triples(with_tables(TRAIN, VALID, 3, 11)[len(TRAIN) :])
    assert len(made) == 3 * 10 * len(PAIRS)
    assert {t[1:] for t in made} == PAIRS
    digits = Counter((str(value).rstrip("0"), *units) for value, *units in made)
    # 10 has the digit of 1
    assert set(digits.values()) == {3, 6}
    assert all((count == 6) == (digit == "1") for (digit, *_), count in digits.items())


def test_nothing_is_told_that_the_validation_asks() -> None:
    """In neither direction."""
    asked = {triple_of(question) for question, _ in VALID}
    made = set(triples(with_tables(TRAIN, VALID, 5, 11)))
    assert not asked & made
    mirrors = {(f"{answer:.8e}", t[2], t[1]) for question, answer in VALID if (t := triple_of(question))}
    new = made - set(triples(TRAIN))
    assert not mirrors & {(f"{t[0]:.8e}", t[1], t[2]) for t in new}


def test_a_seed_gives_the_same_rows() -> None:
    """And another one gives others."""
    first, again, other = (with_tables(TRAIN[:50], VALID, 4, seed) for seed in (1, 1, 2))
    assert first == again != other


def test_a_question_of_another_form_stands_there_once() -> None:
    """Nothing is known of what its number means."""
    rows = [("What is 3 plus 4?", 7.0), ("Water boils at 100 degrees; in kelvin?", 373.15)]
    assert with_tables(rows, VALID, 3, 0) == rows


@given(
    units=st.sampled_from(sorted(FAMILIES)).flatmap(
        lambda family: st.lists(st.sampled_from(sorted(FAMILIES[family])), min_size=2, max_size=2, unique=True)
    ),
    values=st.tuples(st.integers(1, 10), st.integers(1, 5000)),
    chance=st.randoms(use_true_random=False),
)
def test_a_question_about_another_value_keeps_its_words(units, values, chance) -> None:
    """It asks about the same units, and back again it is the same text."""
    question = ask((values[0], *units), chance)
    other = about(question, values[1])
    assert triple_of(other) == (values[1], *units)
    assert about(other, values[0]) == question


def test_a_question_of_another_form_is_about_no_value() -> None:
    """It is refused, and not guessed at."""
    with pytest.raises(ValueError, match="not a question"):
        about("What is 3 plus 4?", 5)
