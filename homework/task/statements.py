"""The statements that the embedded model is pretrained on: facts of conversion, the number last.

A statement says `3 km in m = 3000` in one of many forms and spellings. None is a question, none uses a phrasing of
the app, none holds an answer tag, and none states a triple of the validation set, in any spelling.
"""

from __future__ import annotations

import random
import string
from collections.abc import Collection
from dataclasses import dataclass
from decimal import Decimal

from .answers import format_number
from .units import VALUES, Triple, factor, pairs, spellings


def _parts(text: str, *, separator: str = " ") -> tuple[str, ...]:
    return tuple(text.split(separator))


SOURCE_FIRST = _parts(
    "{v} {f} in {t} | {v} {f} to {t} | {v} {f} into {t} | {v} {f} as {t} | {v} {f}, {t} | {v} {f} ; {t} | "
    "{v} {f} -> {t} | {v} {f} using {t} | {v} {f} written in {t} | {v} {f} expressed in {t} | from {v} {f} to {t} | "
    "{v} {f} stated as {t} | {v} {f} of it in {t} | {v} {f} and {t} | {v} {f} counted as {t} | {v} {f} which in {t}",
    separator=" | ",
)
TARGET_FIRST = _parts(
    "in {t}, {v} {f} | {t} in {v} {f} | the number of {t} in {v} {f} | the {t} from {v} {f} | {t} for {v} {f} | "
    "{t}: {v} {f} | {t} within {v} {f} | {t} ({v} {f}) | {t} that {v} {f} hold | {t} <- {v} {f} | "
    "as {t} and from {v} {f} | {t} of the {v} {f}",
    separator=" | ",
)
JOINS = _parts(
    " = ~=~ is ~ are ~: ~:~ makes ~ gives ~ equals ~\n~.\n~, ~ -> ~;\n~!\n~ comes to ~:\n~ or ~ \n~|", separator="~"
)
WRAPS = (
    ("", ""),
    ("", "."),
    *zip("([{\"'*`|<>", ")]}\"'*`|><", strict=True),
    ("", ";"),
    ("", "!"),
    ("#", "#"),
    ("$", "$"),
)
LEADS = _parts(
    "~~~Fact: ~Note: ~As we know, ~By definition, ~In short, ~Here ~Remember: ~- ~* ~1. ~It is true that ~"
    "The table says ~answer: ~(a) ",
    separator="~",
)
FILLERS = _parts(
    "a about all amount an and any are at be by can change come convert could do equal express find for from get give "
    "have how I if is it know make many me measure measures much my need number of on out please rewrite same say show "
    "so some something take tell that the there this turn up use value want we what when will with work would write "
    "you your answer result Please What How Convert Can Could Tell Give Express If Do Say Work Rewrite In"
)
"""Ordinary words that precede some statements in random order, so that no word of the questions is new later."""

MARKS = (
    *string.ascii_letters,
    *_parts("td num value result out li em data code Please What How Convert Tell Give Say Work In from in as the"),
)
"""Names of the mark-up around some numbers; the tag of the app is not among them."""


@dataclass(frozen=True)
class Statement:
    """One statement, in two parts: before the number, and from the number on."""

    known: str
    """The text up to the number; no token spans its end."""
    told: str
    """The number and what closes it."""


class Speaker:
    """Draws statements from a seed and never says an excluded triple."""

    def __init__(self, seed: int, excluded: Collection[Triple]) -> None:
        self._chance = random.Random(seed)
        self._pairs = pairs()
        self._excluded = frozenset(excluded)
        self._told_by_inverse = frozenset((b, a, _digits(v * factor(a, b))) for v, a, b in self._excluded)

    def may_say(self, value: Decimal, from_unit: str, to_unit: str) -> bool:
        """Return whether neither the statement nor its mirror states an excluded triple."""
        if value == value.to_integral_value() and (int(value), from_unit, to_unit) in self._excluded:
            return False
        return (from_unit, to_unit, _digits(float(value))) not in self._told_by_inverse

    def draw_fact(self) -> tuple[Decimal, str, str]:
        """Return a value with a pair of units that may be said."""
        chance = self._chance
        while True:
            a, b = chance.choice(self._pairs)
            draw = chance.random()
            if draw < 0.6:
                value = Decimal(chance.choice(VALUES))
            elif draw < 0.75:
                value = Decimal(chance.randint(11, 99))
            elif draw < 0.9:
                value = Decimal(chance.randint(11, 99)).scaleb(-1)
            else:
                value = Decimal(chance.randint(2, 9)).scaleb(chance.choice((-1, 1, 2)))
            if self.may_say(value, a, b):
                return value, a, b

    def draw(self) -> Statement:
        """Return one statement."""
        value, a, b = self.draw_fact()
        chance = self._chance
        source, target = chance.choice(spellings(a)), chance.choice(spellings(b))
        form = chance.choice(chance.choice((SOURCE_FIRST, TARGET_FIRST)))
        core = form.format(
            v=_plain(value),
            f=source.one if value == 1 else source.many,
            t=target.one if chance.random() < 0.1 else target.many,
        )
        return self._dress(core, value * Decimal(repr(factor(a, b))), target.many)

    def _dress(self, core: str, result: Decimal, target: str) -> Statement:
        chance = self._chance
        if chance.random() < 0.3:
            words = chance.choices(FILLERS, k=chance.randint(1, 5))
            lead = " ".join(words) + chance.choice((" ", " ", ", ", ": ", ". "))
        else:
            lead = chance.choice(LEADS)
        if chance.random() < 0.1:
            core += " " + " ".join(chance.choices(FILLERS, k=chance.randint(1, 3)))
        before, after = chance.choice(WRAPS) if chance.random() < 0.6 else ("", "")
        if chance.random() < 0.25:
            mark = chance.choice(MARKS)
            before, after = f"<{mark}>", f"</{mark}>"
        if chance.random() < 0.15:
            after = f" {target}{after}"
        return Statement(f"{lead}{core}{chance.choice(JOINS)}{before}", f"{format_number(float(result))}{after}")


def _digits(number: float) -> str:
    return f"{number:.3e}"


def _plain(value: Decimal) -> str:
    return format(value, "f")


def plain_statement(triple: Triple, *, target_first: bool) -> str:
    """Return the plain statement of a triple, up to the number."""
    value, a, b = triple
    source, target = spellings(a)[-1], spellings(b)[-1]
    given = f"{value} {source.one if value == 1 else source.many}"
    return f"in {target.many}, {given} = " if target_first else f"{given} in {target.many} = "
