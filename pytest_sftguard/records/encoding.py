"""How a record is written: plain JSON types, whole files, and the checks of reading.

Numbers that are not finite are kept as they are (`nan`, `inf`) and written to JSON as the strings "nan", "inf" and
"-inf", because JSON has no such numbers; a value that was not seen is `None`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import types
import typing
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class RecordError(ValueError):
    """A file or text that is no record of this schema; the message says what is wrong with it."""


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all: a temporary file beside it takes its place at the end."""
    temporary = path.with_name(f".{path.name[:40]}.{uuid.uuid4().hex}")  # mkstemp's would be unreadable for others
    try:
        with open(temporary, "x", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def numbers(value: Any, where: str = "") -> Iterable[tuple[str, float]]:
    """Every float in a record, with the path to it, for example `steps[2].loss`."""
    if isinstance(value, float):
        yield where, value
    elif dataclasses.is_dataclass(value):
        for f in dataclasses.fields(value):
            yield from numbers(getattr(value, f.name), f"{where}.{f.name}" if where else f.name)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from numbers(item, f"{where}[{key}]")
    elif isinstance(value, tuple):
        for i, item in enumerate(value):
            yield from numbers(item, f"{where}[{i}]")


def encode(value: Any) -> Any:
    """`value` and all within it as plain JSON types."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if dataclasses.is_dataclass(value):
        return {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [encode(item) for item in value]
    return value


def decode(kind: Any, data: Any, where: str) -> Any:
    """Read what `encode` made of a `kind`; a RecordError says at which place, below `where`, something does not fit."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if data is None:
            return None
        return decode(next(a for a in arguments if a is not type(None)), data, where)
    if origin is tuple:
        _expect(isinstance(data, list), where, "a list", data)
        return tuple(decode(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(data))
    if origin is dict:
        _expect(isinstance(data, dict), where, "an object", data)
        return {key: decode(arguments[1], item, f"{where}[{key}]") for key, item in data.items()}
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, data, where)
    return _decode_plain(kind, data, where)


def _decode_dataclass(kind: Any, data: Any, where: str) -> Any:
    _expect(isinstance(data, dict), where, "an object", data)
    hints = _hints(kind)
    unknown = set(data) - set(hints)
    if unknown:
        raise RecordError(f"{where}: unknown field {', '.join(sorted(map(str, unknown)))}")
    try:
        return kind(**{name: decode(hints[name], item, f"{where}.{name}") for name, item in data.items()})
    except (TypeError, ValueError) as error:
        if isinstance(error, RecordError):
            raise
        raise RecordError(f"{where}: {str(error).removeprefix(f'{kind.__name__}.__init__() ')}") from error


def _decode_plain(kind: Any, data: Any, where: str) -> Any:
    if kind is float:
        if isinstance(data, str) and data in ("nan", "inf", "-inf"):
            return float(data)
        _expect(isinstance(data, (int, float)) and not isinstance(data, bool), where, "a number", data)
        try:
            return float(data)
        except OverflowError:
            raise RecordError(f"{where}: expected a number that a float can hold, found one that is larger") from None
    fits = isinstance(data, kind) and (kind is bool or not isinstance(data, bool))
    _expect(fits, where, f"a value of type {kind.__name__}", data)
    return data


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    """Types of the fields of a dataclass; to work them out takes longer than to read all else of a step."""
    return typing.get_type_hints(kind)


def _expect(condition: bool, where: str, wanted: str, data: Any) -> None:
    if not condition:
        raise RecordError(f"{where}: expected {wanted}, found {str(data)[:60]!r}")
