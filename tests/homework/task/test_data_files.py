"""The data files and the statements of pretraining: pint agrees, nothing leaks."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from pathlib import Path

import pytest

from homework.making.build_data import main, split
from homework.task.answers import OPEN_TAG
from homework.task.data import TRAIN_FILE, VALID_FILE, DataError, read_rows
from homework.task.questions import PHRASINGS, triple_of
from homework.task.statements import MARKS, Speaker
from homework.task.units import FAMILIES, canonical_names, convert, factor

FILES = [(TRAIN_FILE, 1000), (VALID_FILE, 500)]


@pytest.mark.parametrize(("path", "count"), FILES)
def test_file_has_its_rows(path: Path, count: int) -> None:
    """1,000 rows to train on, 500 to validate with."""
    assert len(read_rows(path)) == count


@pytest.mark.parametrize("path", [TRAIN_FILE, VALID_FILE])
def test_pint_agrees_with_every_answer(path: Path) -> None:
    """The triple is recovered from the question's text, and a fresh pint registry converts it."""
    pint = pytest.importorskip("pint")
    registry = pint.UnitRegistry()
    names = {"decade": "10 * year"}
    for question, answer in read_rows(path):
        triple = triple_of(question)
        assert triple is not None, question
        value, a, b = triple
        ratio = registry.parse_expression(names.get(a, a)) / registry.parse_expression(names.get(b, b))
        assert answer == pytest.approx(value * ratio.to("dimensionless").magnitude, rel=1e-8), question


def test_no_triple_is_in_both_files() -> None:
    """In canonical units, across all spellings, training and validation share nothing; no unit is asked for itself."""
    train, valid = ({triple_of(question) for question, _ in read_rows(path)} for path, _ in FILES)
    assert not train & valid
    assert all(triple and triple[1] != triple[2] and 1 <= triple[0] <= 10 for triple in train | valid)


def test_the_files_are_built_byte_for_byte(tmp_path: Path) -> None:
    """The build script writes the files that are in the repository."""
    main(["--output-dir", str(tmp_path)], standalone_mode=False)
    for path, _ in FILES:
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_there_are_enough_phrasings_and_every_spelling_is_of_one_unit() -> None:
    """At least twenty phrasings, all different; the table of units has no ambiguous spelling."""
    assert len(set(PHRASINGS)) >= 20
    assert set(canonical_names().values()) == {unit for units in FAMILIES.values() for unit in units}


def test_statements_never_say_a_validation_triple_nor_a_question() -> None:
    """Twenty thousand statements hold no answer tag, no question mark and no phrasing of the app."""
    valid = split()[1]
    speaker = Speaker(7, valid)
    shapes = [
        re.escape(p).replace(r"\{v\}", r"[0-9.]+").replace(r"\{f\}", ".+").replace(r"\{t\}", ".+") for p in PHRASINGS
    ]
    phrasing = re.compile("|".join(shapes))
    for _ in range(20_000):
        statement = speaker.draw()
        text = statement.known + statement.told
        assert OPEN_TAG not in text
        assert "</answer>" not in text
        assert "?" not in text
        assert not phrasing.fullmatch(statement.known.strip())
    assert "answer" not in MARKS


def test_facts_leave_out_the_validation_triples_and_their_mirrors() -> None:
    """`3 gal = 24 pt` in the validation set bars both 3 gallons in pints and 24 pints in gallons."""
    speaker = Speaker(7, [(3, "gallon", "pint")])
    assert not speaker.may_say(Decimal(3), "gallon", "pint")
    assert not speaker.may_say(Decimal(24), "pint", "gallon")
    assert speaker.may_say(Decimal(4), "gallon", "pint")
    valid = set(split()[1])
    drawn = [Speaker(7, valid).draw_fact() for _ in range(10)]
    assert drawn[0] == drawn[1], "the same seed says the same"
    speaker = Speaker(7, valid)
    assert not valid & {(v, a, b) for v, a, b in (speaker.draw_fact() for _ in range(20_000))}


def test_data_sizes_are_decimal_and_volumes_american() -> None:
    """A few numbers that everybody knows."""
    assert factor("gigabyte", "megabyte") == pytest.approx(1000)
    assert convert(3, "gallon", "pint") == pytest.approx(24)
    assert factor("short_ton", "pound") == pytest.approx(2000)
    assert factor("century", "decade") == pytest.approx(10)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "not JSON"),
        ("[]", "not empty"),
        ("{}", "JSON list"),
        ('[["a?", 1], ["b?"]]', "row 2"),
        ('[["a?", 1], ["", 1]]', "row 2"),
        ('[["a?", "1"]]', "row 1"),
        ('[["a?", NaN]]', "row 1"),
        ('[["a?", true]]', "row 1"),
        ('[["a?", 1], 5]', "row 2"),
        (json.dumps([["a?", 10**400]]), "row 1"),
    ],
)
def test_a_malformed_file_is_told_by_row(tmp_path: Path, content: str, words: str) -> None:
    """The message names the file and the row at fault."""
    path = tmp_path / "rows.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=words) as caught:
        read_rows(path)
    assert str(path) in str(caught.value)
