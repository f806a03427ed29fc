"""The conversions of a training file as tables of ten values: a conversion is a proportion, so one row gives them all.

`Say 6 mi in meters` with 9656.064 gives `Say 1 mi in meters` to `Say 10 mi in meters`. Where the validation asks for
such a row, in either direction, its tenfold replaces it (`Say 60 mi in meters`), so that the training still contains no
validation fact.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from .questions import about, triple_of
from .units import VALUES

_DIGITS = 9
"""Values that agree in so many significant digits are equal."""
_LARGEST_TENFOLD = 10**6

Row = tuple[str, float]
Fact = tuple[str, str, str]


def with_tables(rows: Sequence[Row], valid: Sequence[Row], times: int, seed: int) -> list[Row]:
    """Return the rows, and the table of each pair of units in them `times` times over; deterministic for a seed.

    The wording of each row is drawn from those that the file has for the pair. A question in none of the app's
    phrasings, or about the value 0, has no table.
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
    """Return the value, or the smallest of its tenfolds that the validation does not ask about."""
    while _key(value, source, target) in barred:
        value *= 10
        if value > _LARGEST_TENFOLD:
            return None
    return value


def _facts(question: str, answer: float) -> set[Fact]:
    """Return the facts that a row states, in both directions."""
    triple = triple_of(question)
    if triple is None:
        return set()
    value, source, target = triple
    return {_key(value, source, target), _key(answer, target, source)}


def _key(value: float, source: str, target: str) -> Fact:
    return f"{value:.{_DIGITS - 1}e}", source, target
