"""The table of units: families, canonical pint names, and every spelling that a text may use.

Spellings of equal size share one canonical unit (`cc` is a millilitre), so that a triple
(value, from-unit, to-unit) means the same in every spelling.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

Triple = tuple[int, str, str]
"""(value, canonical from-unit, canonical to-unit)."""

VALUES = range(1, 11)
"""The whole numbers that a question may ask about."""


@dataclass(frozen=True)
class Spelling:
    """One spelling of a unit."""

    one: str
    """Written after the value 1."""
    many: str
    """Written after any other value, and as the unit asked for."""


def _same(*texts: str) -> list[Spelling]:
    return [Spelling(text, text) for text in texts]


def _plural(*texts: str) -> list[Spelling]:
    return [Spelling(text, f"{text}s") for text in texts]


FAMILIES: dict[str, dict[str, list[Spelling]]] = {
    "length": {
        "millimeter": _same("mm") + _plural("millimeter", "millimetre"),
        "centimeter": _same("cm") + _plural("centimeter", "centimetre"),
        "meter": _same("m") + _plural("meter", "metre"),
        "kilometer": _same("km") + _plural("kilometer", "kilometre"),
        "inch": [*_same("in"), Spelling("inch", "inches")],
        "foot": [*_same("ft"), Spelling("foot", "feet")],
        "yard": _same("yd") + _plural("yard"),
        "mile": _same("mi") + _plural("mile"),
    },
    "mass": {
        "gram": _same("g") + _plural("gram"),
        "kilogram": _same("kg") + _plural("kilogram"),
        "short_ton": _plural("ton", "short ton"),
        "metric_ton": _plural("metric ton", "tonne"),
        "pound": _same("lb") + _plural("pound", "lb"),
        "ounce": _same("oz") + _plural("ounce"),
    },
    "time": {
        "second": _same("s", "sec") + _plural("second"),
        "minute": _same("min") + _plural("minute"),
        "hour": _same("h", "hr") + _plural("hour"),
        "day": _plural("day"),
        "week": _plural("week"),
        "month": _plural("month"),
        "year": _plural("year"),
        "decade": _plural("decade"),
        "century": [Spelling("century", "centuries")],
    },
    "data": {
        "bit": _plural("bit"),
        "byte": _same("B") + _plural("byte"),
        "kilobyte": _same("KB", "kB") + _plural("kilobyte"),
        "megabyte": _same("MB", "M") + _plural("megabyte"),
        "gigabyte": _same("GB", "G") + _plural("gigabyte"),
    },
    "volume": {
        "milliliter": _same("ml", "cc") + _plural("milliliter", "millilitre"),
        "liter": _same("l") + _plural("liter", "litre"),
        "millimeter**3": _same("mm**3"),
        "gallon": _same("gal") + _plural("gallon"),
        "quart": _same("qt") + _plural("quart"),
        "pint": _same("pt") + _plural("pint"),
        "fluid_ounce": _same("fl oz") + _plural("fluid ounce"),
    },
    "speed": {
        "kilometer/hour": _same("km/h", "kmh"),
        "meter/second": _same("m/s"),
        "mile/hour": _same("mi/h", "mph"),
        "foot/second": _same("ft/s"),
        "inch/second": _same("in/s"),
    },
}
"""Family, then canonical name as pint reads it, then the spellings. Data sizes are decimal, volumes are US."""


def pairs() -> list[tuple[str, str]]:
    """Return every ordered (from-unit, to-unit) of one family, never a unit with itself, in table order."""
    return [(a, b) for units in FAMILIES.values() for a in units for b in units if a != b]


def spellings(unit: str) -> list[Spelling]:
    """Return the spellings of a canonical unit. Raises KeyError for a name that the table lacks."""
    for units in FAMILIES.values():
        if unit in units:
            return units[unit]
    raise KeyError(unit)


@lru_cache(maxsize=1)
def canonical_names() -> dict[str, str]:
    """Return every spelling, singular and plural, with its canonical unit."""
    names: dict[str, str] = {}
    for units in FAMILIES.values():
        for unit, known in units.items():
            for spelling in known:
                for text in (spelling.one, spelling.many):
                    if names.setdefault(text, unit) != unit:
                        raise ValueError(f"the spelling {text!r} stands for both {names[text]} and {unit}")
    return names


_IN_PINTS_WORDS = {"decade": "10 * year"}
"""Canonical names that pint reads as something else: its `decade` is a ratio of ten, not ten years."""


@lru_cache(maxsize=1)
def _registry() -> Any:
    import pint

    return pint.UnitRegistry()


@cache
def _one(unit: str) -> Any:
    return 1.0 * _registry().parse_expression(_IN_PINTS_WORDS.get(unit, unit))


@cache
def factor(from_unit: str, to_unit: str) -> float:
    """Return how many `to_unit` one `from_unit` is, by pint."""
    return float((_one(from_unit) / _one(to_unit)).to("dimensionless").magnitude)


def convert(value: float, from_unit: str, to_unit: str) -> float:
    """Return `value` of `from_unit` in `to_unit`, by pint."""
    return value * factor(from_unit, to_unit)
