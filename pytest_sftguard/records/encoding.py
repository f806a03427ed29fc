"""The file format of records: plain JSON types, complete files, and the checks of reading.

Numbers that are not finite stay floats (`nan`, `inf`) in memory and become the strings "nan", "inf" and "-inf" in JSON,
which has no such numbers. A value that was not seen is `None`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import types
import typing
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

_T = TypeVar("_T")


class RecordError(ValueError):
    """A file or value that is not a record of this schema; the message says why."""


def write_text(path: Path, text: str) -> None:
    """Write a file completely or not at all: a temporary file in the same folder replaces it at the end."""
    # mkstemp would make a file that other users cannot read
    temporary = path.with_name(f".{path.name[:40]}.{uuid.uuid4().hex}")
    try:
        with open(temporary, "x", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_json(path: Path, parse: Callable[[Any], _T]) -> _T:
    """Return what `parse` makes of the JSON in a file. Every error is a RecordError that begins with the path."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecordError(f"{path}: there is no such file or folder") from None
    except (OSError, ValueError, RecursionError) as error:
        raise RecordError(f"{path}: cannot be read as a record or a bundle: {error}") from error
    try:
        return parse(data)
    except RecordError as error:
        raise RecordError(f"{path}: {error}") from error


def numbers(value: Any, where: str = "") -> Iterable[tuple[str, float]]:
    """Yield every float in a record with the path to it, for example `steps[2].loss`."""
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
    """Return `value`, and everything in it, as plain JSON types."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if dataclasses.is_dataclass(value):
        return {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [encode(item) for item in value]
    return value


def decode(expected: Any, data: Any, where: str) -> Any:
    """Read what `encode` made of an object of type `expected`. Raises RecordError, which says where it does not fit."""
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
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
    if dataclasses.is_dataclass(expected):
        return _decode_dataclass(expected, data, where)
    return _decode_plain(expected, data, where)


def _decode_dataclass(expected: Any, data: Any, where: str) -> Any:
    _expect(isinstance(data, dict), where, "an object", data)
    hints = _hints(expected)
    unknown = set(data) - set(hints)
    if unknown:
        raise RecordError(f"{where}: unknown field {', '.join(sorted(map(str, unknown)))}")
    try:
        return expected(**{name: decode(hints[name], item, f"{where}.{name}") for name, item in data.items()})
    except (TypeError, ValueError) as error:
        if isinstance(error, RecordError):
            raise
        raise RecordError(f"{where}: {str(error).removeprefix(f'{expected.__name__}.__init__() ')}") from error


def _decode_plain(expected: Any, data: Any, where: str) -> Any:
    if expected is float:
        if isinstance(data, str) and data in ("nan", "inf", "-inf"):
            return float(data)
        _expect(isinstance(data, (int, float)) and not isinstance(data, bool), where, "a number", data)
        try:
            return float(data)
        except OverflowError:
            raise RecordError(f"{where}: expected a number that a float can hold, found one that is larger") from None
    fits = isinstance(data, expected) and (expected is bool or not isinstance(data, bool))
    _expect(fits, where, f"a value of type {expected.__name__}", data)
    return data


@functools.cache
def _hints(expected: Any) -> dict[str, Any]:
    """Types of the fields of a dataclass; resolving them takes longer than everything else in reading a step."""
    return typing.get_type_hints(expected)


def _expect(condition: bool, where: str, wanted: str, data: Any) -> None:
    if not condition:
        raise RecordError(f"{where}: expected {wanted}, found {str(data)[:60]!r}")
