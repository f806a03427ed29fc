"""`python -m pytest_sftguard`: one thin subcommand for each capability that needs no test."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from pytest_sftguard.commands import SUBCOMMANDS
from pytest_sftguard.commands.reading import MisuseError
from pytest_sftguard.records import RecordError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; exit code 0 all is well, 1 it is not, 2 an error of use or of a file, 130 interrupted."""
    options = _parser().parse_args(arguments)
    try:
        code: int = options.run(options)
        sys.stdout.flush()
    except (MisuseError, RecordError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # the reader has gone, as `head` does
        sys.stdout = None
        return 1
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pytest_sftguard",
        description="Numerical stability of LoRA fine-tuning, outside of pytest.",
        epilog="exit codes: 0 none of the following; 1 something failed, was missed, does not fit, or alarms;"
        " 2 an error of use or of a file",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name in SUBCOMMANDS:
        importlib.import_module(f"pytest_sftguard.commands.{name}").add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
