"""The text of an answer: `<answer>NUMBER</answer>`, written with few significant digits and read strictly.

A lenient parser measures itself and not the model. This one matches the whole text or says why it did not.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import Decimal

OPEN_TAG = "<answer>"
CLOSE_TAG = "</answer>"
RELATIVE_TOLERANCE = 0.05
"""An answer is right when it is within this fraction of the expected number."""

_NUMBER = re.compile(r"[+-]?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,3})?", re.ASCII)


@dataclass(frozen=True)
class Notation:
    """How a number is written."""

    digits: int
    """Significant digits; trailing zeros are left out."""
    plain: range
    """Decimal exponents of numbers without an `e`: 0 for 1 to below 10, -3 for 0.001; all others like `3.156e9`."""


FOUR_DIGITS = Notation(digits=4, plain=range(-3, 6))
"""Plain from 0.001 to below 1e6."""
TWO_DIGITS = Notation(digits=2, plain=range(0))
"""Always with an exponent, like `9.7e3`: as many digits as the tolerance needs, and none to learn in vain."""


@dataclass(frozen=True)
class Parsed:
    """An answer that was read."""

    value: float
    """The finite number between the tags."""


@dataclass(frozen=True)
class Unparsed:
    """An answer that was not read; never equal to any number."""

    reason: str
    """What is wrong with the text, in a few words."""


def format_number(value: float, notation: Notation = FOUR_DIGITS) -> str:
    """Return `value` in a notation; zero is `0` in every one.

    Raises ValueError for a number that is not finite.
    """
    if not math.isfinite(value):
        raise ValueError(f"only a finite number can be an answer, not {value!r}")
    if value == 0:
        return "0"
    mantissa, _, exponent_text = f"{value:.{notation.digits - 1}e}".partition("e")
    exponent = int(exponent_text)
    if exponent in notation.plain:
        plain = format(Decimal(mantissa).scaleb(exponent), "f")
        return plain.rstrip("0").rstrip(".") if "." in plain else plain
    return f"{mantissa.rstrip('0').rstrip('.')}e{exponent}"


def format_answer(value: float, notation: Notation = FOUR_DIGITS) -> str:
    """Return the full answer text for a number, tags included."""
    return f"{OPEN_TAG}{format_number(value, notation)}{CLOSE_TAG}"


def read_number(text: str) -> Parsed | Unparsed:
    """Read a whole text as one number in ASCII digits: optional sign, decimals and exponent, nothing else."""
    if not text:
        return Unparsed("there is no number")
    if not _NUMBER.fullmatch(text):
        return Unparsed(f"{text[:40]!r} is not a number")
    value = float(text)
    if not math.isfinite(value):
        return Unparsed(f"{text[:40]!r} is too large for a float")
    return Parsed(value)


def read_answer(text: str) -> Parsed | Unparsed:
    """Read a completion, seeded prefix included, that must be exactly one tagged number.

    White space around the whole answer is allowed; white space inside, a second answer or an echo of the prompt is not.
    """
    body = text.strip(" \t\r\n")
    if not body:
        return Unparsed("the text is empty")
    if not body.startswith(OPEN_TAG):
        return Unparsed(f"the text does not start with {OPEN_TAG}")
    if not body.endswith(CLOSE_TAG):
        return Unparsed(f"the text does not end with {CLOSE_TAG}")
    inner = body[len(OPEN_TAG) : len(body) - len(CLOSE_TAG)]
    if len(body) < len(OPEN_TAG) + len(CLOSE_TAG):
        return Unparsed("the tags overlap")
    return read_number(inner)


def is_right(answer: Parsed | Unparsed, expected: float, tolerance: float = RELATIVE_TOLERANCE) -> bool:
    """Return whether an answer was read and lies within `tolerance` (a fraction) of `expected`."""
    return isinstance(answer, Parsed) and abs(answer.value - expected) <= tolerance * abs(expected)
