"""The text of an answer: what is written can be read, and nothing else can."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from homework.sft import parse_answer
from homework.task.answers import (
    FOUR_DIGITS,
    TWO_DIGITS,
    Notation,
    Parsed,
    Unparsed,
    format_answer,
    format_number,
    is_right,
    read_answer,
    read_number,
)

NUMBERS = st.floats(min_value=1e-30, max_value=1e30).flatmap(lambda x: st.sampled_from([x, -x]))


NOTATIONS = st.sampled_from([FOUR_DIGITS, TWO_DIGITS])


@given(NUMBERS, NOTATIONS)
def test_a_written_answer_is_read_within_half_a_unit_of_its_last_digit(number: float, notation: Notation) -> None:
    """Format, then parse, comes back within 5e-4 relative for four digits, and 0.05 for two."""
    found = read_answer(format_answer(number, notation))
    assert isinstance(found, Parsed)
    assert abs(found.value - number) <= 5.0001 * 10.0**-notation.digits * abs(number)


@given(NUMBERS)
def test_two_digits_are_enough_to_be_right(number: float) -> None:
    """Rounding alone never makes an answer wrong."""
    assert is_right(read_answer(format_answer(number, TWO_DIGITS)), number)


@given(NUMBERS, NOTATIONS)
def test_writing_what_was_read_gives_the_same_text(number: float, notation: Notation) -> None:
    """A number already rounded keeps its text."""
    text = format_number(number, notation)
    assert format_number(float(text), notation) == text


@given(NUMBERS)
def test_a_written_number_is_short(number: float) -> None:
    """No number needs more than eleven characters."""
    assert len(format_number(number)) <= 11


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (24, "24"),
        (4828.032, "4828"),
        (999999, "1e6"),
        (123456, "123500"),
        (3.15576e9, "3.156e9"),
        (0.001, "0.001"),
        (0.00099996, "0.001"),
        (0.00012, "1.2e-4"),
        (0, "0"),
        (-2.5, "-2.5"),
        (100, "100"),
    ],
)
def test_numbers_have_one_expected_text(number: float, text: str) -> None:
    """Plain from 0.001 to below a million, with an exponent outside, and no trailing zeros."""
    assert format_number(number) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(24, "2.4e1"), (9656.064, "9.7e3"), (1000, "1e3"), (0.5, "5e-1"), (9.96, "1e1"), (-3.14e-9, "-3.1e-9"), (0, "0")],
)
def test_two_digits_have_one_expected_text(number: float, text: str) -> None:
    """Always with an exponent, and no trailing zeros."""
    assert format_number(number, TWO_DIGITS) == text


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_cannot_be_written(number: float) -> None:
    """There is no text for NaN or infinity."""
    with pytest.raises(ValueError, match="finite"):
        format_number(number)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nan",
        "inf",
        "-inf",
        "5.",
        ".5",
        "1,234",
        "\uff11\uff12",
        "\u0663",
        "007",
        "1e",
        "--1",
        "1 2",
        " 1",
        "1\n",
        "0x10",
        "1_000",
        "1e+",
        "1e9999",
        "+",
        "e5",
    ],
)
def test_junk_is_not_a_number(text: str) -> None:
    """The grammar takes ASCII digits with optional sign, decimals and exponent, and the whole text."""
    assert isinstance(read_number(text), Unparsed)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "24",
        "<answer>24",
        "24</answer>",
        "<answer></answer>",
        "<answer>",
        "<answer>24</answer><answer>24</answer>",
        "What are 3 gallons in pints?\n<answer>24</answer>",
        "<answer>24</answer> and more",
        "<answer>24 pints</answer>",
        "(answer)24</answer>",
        "<answer>24[/answer]",
        "<answer> 24</answer>",
        "<Answer>24</Answer>",
        "<answer>nan</answer>",
        "<answer>1,234</answer>",
        "<answer/answer>",
    ],
)
def test_a_text_that_is_not_exactly_one_answer_is_unparsed(text: str) -> None:
    """A bare number, a run-on, a second answer or an echo of the prompt gives None."""
    assert parse_answer(text) is None


def test_a_well_formed_answer_is_parsed() -> None:
    """The number between the tags comes back, and white space around the whole does no harm."""
    assert parse_answer("<answer>24</answer>") == 24
    assert parse_answer("<answer>3.156e9</answer>\n") == 3.156e9


@given(st.text())
def test_any_text_gets_a_verdict(text: str) -> None:
    """The reader never raises, and what it parses is finite."""
    found = read_answer(f"<answer>{text}</answer>")
    assert isinstance(found, Unparsed) or math.isfinite(found.value)


@given(NUMBERS)
def test_only_a_near_number_is_right(number: float) -> None:
    """Five per cent is the line; an unparsed answer is never right."""
    assert is_right(Parsed(number * 1.049), number)
    assert not is_right(Parsed(number * 1.051), number)
    assert not is_right(Parsed(math.nan), number)
    assert not is_right(Unparsed("no number"), number)
