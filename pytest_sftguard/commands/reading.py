"""Reading what a user typed: texts of options to values, with messages that say what is valid."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pytest_sftguard import settings

T = TypeVar("T")

whole = settings.whole(1)
"""A whole number, at least 1."""


class MisuseError(Exception):
    """The user asked for something that cannot be had; the message says what is valid."""


def read(reader: Callable[[str], T]) -> Callable[[str], T]:
    """`reader` for argparse: its message is kept, and quotes the value."""

    def read(text: str) -> T:
        try:
            return reader(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} cannot be used: {error}") from None

    return read


def batches(text: str) -> list[int]:
    """Micro-batches, sorted."""
    found = settings.batches(text)
    if any(b.accumulation is not None for b in found):
        raise ValueError("write micro-batches as numbers such as 1,2,4,8")
    return sorted({b.per_device for b in found})


def add_files(command: argparse.ArgumentParser) -> None:
    """Add the files of records that a subcommand takes."""
    command.add_argument(
        "files", type=Path, nargs="+", metavar="PATH", help="a record, a bundle, or a folder such as .sftguard"
    )


def records(number: int) -> str:
    """So many records, in words."""
    return f"{number} record{'s' * (number != 1)}"
