"""The conversions of a training file as tables of ten values: a conversion is a proportion, so one row gives them all.

`Say 6 mi in meters` with 9656.064 gives `Say 1 mi in meters` to `Say 10 mi in meters`. Where a validation asks such a
row, in either direction, its tenfold stands for it (`Say 60 mi in meters`), so that the validation goes on asking what
no row of the training says.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from .questions import about, triple_of
from .units import VALUES

_DIGITS = 9
"""Significant digits in which two values are one."""
_LARGEST_TENFOLD = 10**6

Row = tuple[str, float]
Fact = tuple[str, str, str]


def with_tables(rows: Sequence[Row], valid: Sequence[Row], times: int, seed: int) -> list[Row]:
    """Return the rows, and the table of each pair of units in them `times` times over; deterministic for a seed.

    The wording of a row is drawn anew each time, among those that the file has for the pair. A question that is none
    of the app's phrasings, or whose value is 0, has no table, and stands there once.
    """
    chance = random.Random(seed)
    barred = {key for question, answer in valid for key in _facts(question, answer)}
    wordings: dict[tuple[str, str], list[tuple[str, float]]] = {}
    for question, answer in rows:
        triple = triple_of(question)
        if triple is not None and triple[0]:
            wordings.setdefault(triple[1:], []).append((question, answer / triple[0]))
    made = list(rows)
    for _ in range(times):
        for (source, target), known in wordings.items():
            for value in VALUES:
                question, factor = chance.choice(known)
                told = _told(value, source, target, barred)
                if told is not None:
                    made.append((about(question, told), factor * told))
    return made


def _told(value: int, source: str, target: str, barred: set[Fact]) -> int | None:
    """The value, or the least of its tenfolds that the validation does not ask about."""
    while _key(value, source, target) in barred:
        value *= 10
        if value > _LARGEST_TENFOLD:
            return None
    return value


def _facts(question: str, answer: float) -> set[Fact]:
    """What a row says, in both directions."""
    triple = triple_of(question)
    if triple is None:
        return set()
    value, source, target = triple
    return {_key(value, source, target), _key(answer, target, source)}


def _key(value: float, source: str, target: str) -> Fact:
    return f"{value:.{_DIGITS - 1}e}", source, target
