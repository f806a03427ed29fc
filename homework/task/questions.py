"""The phrasings of a question, in both directions: triple to text, and text back to its canonical triple."""

from __future__ import annotations

import random
import re
from functools import lru_cache

from .units import Triple, canonical_names, spellings

PHRASINGS = (
    "What are {v} {f} in {t}?",
    "What is {v} {f} in {t}?",
    "How many {t} are in {v} {f}?",
    "How many {t} are there in {v} {f}?",
    "How many {t} make up {v} {f}?",
    "How many {t} do {v} {f} come to?",
    "How many {t} would I get from {v} {f}?",
    "Please turn {v} {f} into {t}.",
    "Convert {v} {f} to {t}.",
    "Convert {v} {f} into {t}, please.",
    "Can you convert {v} {f} to {t}?",
    "Could you change {v} {f} into {t} for me?",
    "Tell me what {v} {f} are in {t}.",
    "I have {v} {f}. What is that in {t}?",
    "I need {v} {f} in {t}.",
    "Give me {v} {f} in {t}.",
    "Rewrite {v} {f} using {t}.",
    "Work out {v} {f} in {t}.",
    "If something measures {v} {f}, what is it in {t}?",
    "Express {v} {f} in {t}.",
    "{v} {f} is how many {t}?",
    "{v} {f} to {t}, please!",
    "Do you know the number of {t} in {v} {f}?",
    "What do you get when you turn {v} {f} into {t}?",
    "In {t}, what is {v} {f}?",
    "Say {v} {f} in {t}.",
)
"""`{v}` is the value, `{f}` the unit that it is given in, `{t}` the unit asked for."""


def ask(triple: Triple, chance: random.Random) -> str:
    """Return one phrasing of a triple, with phrasing and spellings drawn from `chance`."""
    value, from_unit, to_unit = triple
    source = chance.choice(spellings(from_unit))
    target = chance.choice(spellings(to_unit))
    phrasing = chance.choice(PHRASINGS)
    return phrasing.format(v=value, f=source.one if value == 1 else source.many, t=target.many)


@lru_cache(maxsize=1)
def _patterns() -> list[re.Pattern[str]]:
    names = "|".join(re.escape(name) for name in sorted(canonical_names(), key=len, reverse=True))
    parts = {"{v}": "(?P<v>[0-9]+)", "{f}": f"(?P<f>{names})", "{t}": f"(?P<t>{names})"}
    found = []
    for phrasing in PHRASINGS:
        pieces = re.split(r"(\{[vft]\})", phrasing)
        found.append(re.compile("".join(parts.get(piece, re.escape(piece)) for piece in pieces), re.ASCII))
    return found


def _matched(question: str) -> re.Match[str] | None:
    return next((match for pattern in _patterns() if (match := pattern.fullmatch(question))), None)


def triple_of(question: str) -> Triple | None:
    """Return the canonical triple that a question asks about, or None where no phrasing fits."""
    names, match = canonical_names(), _matched(question)
    return None if match is None else (int(match["v"]), names[match["f"]], names[match["t"]])


def about(question: str, value: int) -> str:
    """Return the question about another value, in the same words. Raises ValueError where no phrasing fits."""
    match = _matched(question)
    if match is None:
        raise ValueError(f"not a question of the app's: {question!r}")
    unit = next(s for s in spellings(canonical_names()[match["f"]]) if match["f"] in (s.one, s.many))
    inserted = {match.span("v"): str(value), match.span("f"): unit.one if value == 1 else unit.many}
    for (begin, end), text in sorted(inserted.items(), reverse=True):
        question = question[:begin] + text + question[end:]
    return question
