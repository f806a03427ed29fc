"""Trying the target's own `parse_answer`: the guard has its numbers from it, so that it must not make any up.

A parser may be as strict as it likes, and read decimals, thousands separators or units or not. What it must never do
is find a number where none is, or another than the one that is written.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

from pytest_sftguard.engine.building.targets import Target
from pytest_sftguard.records import Names, ParserRecord

_NOT_A_NUMBER = ("", " ", "nan", "NaN", "inf", "-inf", "Infinity", "None", "N/A", "unknown")
"""What may stand in the place of the number without being one."""
_REFUSALS = ("", " ", "\n", "nan", "inf", "I do not know.", "There is no answer.", "Sorry, I cannot help with that.")
"""Whole texts without a number."""
_WRITTEN_OTHERWISE: dict[str, tuple[float, ...]] = {
    "5.": (5.0,),
    "1,234": (1234.0, 1.234),  # where the comma is a thousands separator, and where it is the decimal point
    "\uff11\uff12": (12.0,),
    "-7": (-7.0,),
    "+7": (7.0,),
}
"""Numbers as they may be written, and what each may be read as."""
_NUMBER = re.compile(r"[+-]?[0-9][0-9,]*(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?", re.ASCII)
_ROWS_TRIED = 8


def tried(
    target: Target, tokenizer: Any, pairs: list[tuple[str, float]], batches: list[dict[str, Any]]
) -> ParserRecord | None:
    """Give the parser texts without an answer, and answers of the training rows with junk in the number's place."""
    if target.parse_answer is None or not pairs:
        return None
    found: dict[str, list[str]] = {"junk": [], "misread": [], "raised": []}
    forms = list(dict.fromkeys(_forms(target, tokenizer, batches)))
    count = 0
    for text, allowed in dict.fromkeys(_texts(target, pairs, forms)):
        count += 1
        try:
            value = target.parse_answer(text)
        except Exception as error:  # the user's code may raise anything
            found["raised"].append(f"{text[:60]!r}: {type(error).__name__}")
            continue
        if value is not None and value not in allowed:
            found["misread" if allowed else "junk"].append(f"{text[:60]!r} as {value!r}")
    return ParserRecord(tried=count, **{k: Names.of(v) for k, v in found.items()})


def _texts(
    target: Target, pairs: list[tuple[str, float]], forms: Iterable[tuple[str, str]]
) -> Iterator[tuple[str, tuple[float, ...]]]:
    """Texts, each with the numbers that may be read in it; none where it is junk."""
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
        for written, readings in _WRITTEN_OTHERWISE.items():
            yield f"{before}{written}{after}", readings


def _forms(target: Target, tokenizer: Any, batches: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """What stands before and after the number in the answers that the rows teach, and that the parser reads."""
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
    except Exception:  # told of where the text is junk; here it only gives no form
        return None
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _taught(tokenizer: Any, batches: list[dict[str, Any]]) -> list[str]:
    """The supervised texts of the first rows."""
    texts = []
    for batch in batches[:_ROWS_TRIED]:
        labels, ids = batch.get("labels"), batch.get("input_ids")
        if getattr(labels, "dim", int)() != 2 or getattr(ids, "shape", None) != labels.shape:  # type: ignore[union-attr]
            continue
        rows = zip(ids[:_ROWS_TRIED], labels[:_ROWS_TRIED], strict=True)  # type: ignore[index]
        texts += [tokenizer.decode(i[lab != -100], skip_special_tokens=True) for i, lab in rows]
    return texts
