"""Tests of the target's own `parse_answer`, on which the guard relies for its numbers.

A parser may be strict, and accept or refuse decimals, thousands separators and units. It must never find a number where
there is none, or another number than the one that is written.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

from pytest_sftguard.engine.after.generation import labelled
from pytest_sftguard.engine.building.targets import Target
from pytest_sftguard.records import Names, ParserRecord

_NOT_A_NUMBER = ("", " ", "nan", "NaN", "inf", "-inf", "Infinity", "None", "N/A", "unknown")
"""Texts in place of the number that are not numbers."""
_REFUSALS = ("", " ", "\n", "nan", "inf", "I do not know.", "There is no answer.", "Sorry, I cannot help with that.")
"""Complete texts without a number."""
_SPELLINGS: dict[str, tuple[float, ...]] = {
    "5.": (5.0,),
    # the comma is a thousands separator in one language, and the decimal point in another
    "1,234": (1234.0, 1.234),
    "\uff11\uff12": (12.0,),
    "-7": (-7.0,),
    "+7": (7.0,),
}
"""Spellings of numbers, with the values that a parser may read in each."""
_NUMBER = re.compile(r"[+-]?[0-9][0-9,]*(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?", re.ASCII)
_ROWS_TRIED = 8


def tried(
    target: Target, tokenizer: Any, pairs: list[tuple[str, float]], batches: list[dict[str, Any]]
) -> ParserRecord | None:
    """Test the parser with texts without an answer, and with taught answers whose number is replaced."""
    if target.parse_answer is None or not pairs:
        return None
    found: dict[str, list[str]] = {"junk": [], "misread": [], "raised": []}
    forms = list(dict.fromkeys(_forms(target, tokenizer, batches)))
    count = 0
    for text, allowed in dict.fromkeys(_texts(target, pairs, forms)):
        count += 1
        try:
            value = target.parse_answer(text)
        # the user's code may raise anything
        except Exception as error:
            found["raised"].append(f"{text[:60]!r}: {type(error).__name__}")
            continue
        if value is not None and value not in allowed:
            found["misread" if allowed else "junk"].append(f"{text[:60]!r} as {value!r}")
    return ParserRecord(tried=count, **{k: Names.of(v) for k, v in found.items()})


def _texts(
    target: Target, pairs: list[tuple[str, float]], forms: Iterable[tuple[str, str]]
) -> Iterator[tuple[str, tuple[float, ...]]]:
    """Texts, each with the numbers that a parser may read in it; none for junk."""
    prefix = target.answer_prefix
    for text in _REFUSALS:
        yield text, ()
        yield prefix + text, ()
    for prompt, _ in pairs[:3]:
        yield prompt, ()
        yield prefix + prompt, ()
    for before, after in forms:
        for junk in _NOT_A_NUMBER:
            yield f"{before}{junk}{after}", ()
        for written, readings in _SPELLINGS.items():
            yield f"{before}{written}{after}", readings


def _forms(target: Target, tokenizer: Any, batches: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Text before and after the number, in those taught answers that the parser reads."""
    assert target.parse_answer is not None
    for text in _taught(tokenizer, batches):
        for whole in (text, target.answer_prefix + text):
            number = _read(target, whole)
            for match in _NUMBER.finditer(whole):
                if number is not None and math.isfinite(number) and float(match[0].replace(",", "")) == number:
                    yield whole[: match.start()], whole[match.end() :]
                    break


def _read(target: Target, text: str) -> float | None:
    assert target.parse_answer is not None
    try:
        value = target.parse_answer(text)
    # `tried` reports it for junk; here the text only gives no form
    except Exception:
        return None
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _taught(tokenizer: Any, batches: list[dict[str, Any]]) -> list[str]:
    """The supervised texts of the first rows."""
    pairs = labelled(batches[:_ROWS_TRIED])
    rows = [row for ids, labels in pairs for row in zip(ids[:_ROWS_TRIED], labels[:_ROWS_TRIED], strict=True)]
    return [tokenizer.decode(ids[labels != -100], skip_special_tokens=True) for ids, labels in rows]
