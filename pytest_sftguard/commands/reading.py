"""Reading what a user typed: texts of options to values, with messages that say what is valid."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pytest_sftguard import sizes
from pytest_sftguard.matrix import parse_batch
from pytest_sftguard.precision import mode_named


class MisuseError(Exception):
    """Something that the user asked for and cannot have; the message says what is valid."""


def read(reader: Any) -> Any:
    """A reader of ours as argparse wants it, its message kept."""

    def read(text: str) -> Any:
        try:
            return reader(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


def share(text: str) -> float:
    """A share from 0 up to 1."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < 1:
        raise ValueError(f"{text!r} is no share: give a number from 0 up to 1, such as {sizes.DEFAULT_MARGIN}")
    return number


def whole(text: str) -> int:
    """A whole number from 1 on."""
    if not (text.isascii() and text.isdigit() and int(text) >= 1):
        raise ValueError(f"{text!r} is no whole number from 1 on")
    return int(text)


def batches(text: str) -> list[int]:
    """Micro-batches, sorted."""
    found = [parse_batch(item) for item in text.replace(",", " ").split()]
    if not found or any(b.accumulation is not None for b in found):
        raise ValueError(f"{text!r} is no list of micro-batches: write numbers such as 1,2,4,8")
    return sorted({b.per_device for b in found})


def precisions(text: str) -> list[str]:
    """Names of precision modes."""
    return [mode_named(item).name for item in text.replace(",", " ").split()]


def add_paths(command: argparse.ArgumentParser) -> None:
    """Add the paths of records that a subcommand takes."""
    command.add_argument(
        "paths", type=Path, nargs="+", metavar="PATH", help="a record, a bundle, or a folder such as .sftguard"
    )
