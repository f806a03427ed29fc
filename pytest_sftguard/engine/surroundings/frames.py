"""Room for Python's frames, so that a training does not go to and fro across the end of a piece of its stack.

CPython keeps frames, from 3.11 on, in pieces of 16 KiB; where one is full it asks the system for the next, and gives
it back as soon as it is empty. A training whose calls happen to lie across such an end maps and unmaps memory at every
call of a module: steps of 54 ms took 79 where a pytest fixture was that deep, and 63 where another one was.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any, TypeVar, cast

T = TypeVar("T")

_SLOTS = 70_000
"""Pointers that the frame claims to need: over 512 KiB, so that it begins a piece of 1 MiB; the rest is for others."""


def _call(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


_call_with_room = FunctionType(_call.__code__.replace(co_stacksize=_SLOTS), globals(), "_call_with_room")


def with_room(function: Callable[..., T], *args: Any) -> T:
    """`function(*args)`, with room for some thousand frames in one piece; only what is used of it takes memory."""
    return cast(T, _call_with_room(function, *args))
