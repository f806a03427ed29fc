"""`bundle`: puts records into one file, to take home from the machine that made them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pytest_sftguard import bundles
from pytest_sftguard.commands.reading import MisuseError, add_files, records


def add(commands: Any) -> None:
    """Add the subcommand to `commands`, argparse's subparsers."""
    command = commands.add_parser(
        "bundle",
        help="put records into one file, to take home from the machine that made them",
        description="Write all records into one file, which `judge` reads. The file is written whole or not at all.",
    )
    command.set_defaults(run=run)
    command.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the file to write")
    add_files(command)


def run(options: argparse.Namespace) -> int:
    """Write one file with all records."""
    found = bundles.collect(options.files)
    try:
        bundles.write(options.output, found)
    except OSError as error:
        raise MisuseError(f"{options.output} cannot be written: {error.strerror or error}") from None
    print(f"{records(len(found))} in {options.output}")
    return 0
