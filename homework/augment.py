"""More rows from the same facts: a conversion is a proportion, so that each row tells it for every value.

`Say 6 mi in meters` with 9656.064 becomes `Say 30 mi in meters` with 48280.32: the same question about another value.
What a validation asks is left out, in either direction, so that it goes on asking what no row of the training says.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from .questions import triple_of

_VALUE = re.compile(r"(?<![\w.*])[0-9]+(?![\w.*])")
_DIGITS = 9
"""Significant digits in which two values are one."""


def augmented(
    rows: Sequence[tuple[str, float]], valid: Sequence[tuple[str, float]], times: int, seed: int
) -> list[tuple[str, float]]:
    """Return the rows, and each of them with `times` - 1 other values; deterministic for a seed.

    Values are 1 to 10, their tenfolds and tenths, whole numbers to 99 and halves. A row whose question is not of the
    app's phrasings stays as it is.
    """
    chance = random.Random(seed)
    barred = {key for question, answer in valid for key in _facts(question, answer)}
    made = list(rows)
    for _ in range(times - 1):
        for question, answer in rows:
            made.append(_with_another_value(question, answer, barred, chance))
    return made


def _with_another_value(
    question: str, answer: float, barred: set[tuple[str, str, str]], chance: random.Random
) -> tuple[str, float]:
    triple = triple_of(question)
    if triple is None or not triple[0]:
        return question, answer
    value, source, target = triple
    for _ in range(20):
        other = _drawn(chance)
        scaled = answer * other / value
        if not barred & {_key(other, source, target), _key(scaled, target, source)}:
            return _VALUE.sub(f"{other:g}", question, count=1), scaled
    return question, answer


def _drawn(chance: random.Random) -> float:
    kind = chance.random()
    if kind < 0.6:
        return float(chance.randint(1, 10))
    if kind < 0.85:
        return round(chance.randint(1, 10) * chance.choice((0.1, 10.0, 100.0)), 1)
    if kind < 0.95:
        return float(chance.randint(11, 99))
    return chance.randint(0, 9) + 0.5


def _facts(question: str, answer: float) -> set[tuple[str, str, str]]:
    triple = triple_of(question)
    if triple is None:
        return set()
    value, source, target = triple
    return {_key(value, source, target), _key(answer, target, source)}


def _key(value: float, source: str, target: str) -> tuple[str, str, str]:
    return f"{value:.{_DIGITS - 1}e}", source, target
