"""`judge`: judges records that were made elsewhere or earlier."""

from __future__ import annotations

import argparse
from typing import Any

from pytest_sftguard import bundles, registry
from pytest_sftguard.commands.reading import MisuseError, add_files, records


def add(commands: Any) -> None:
    """Add the subcommand to `commands`, argparse's subparsers."""
    command = commands.add_parser(
        "judge",
        help="judge records that were made elsewhere or earlier",
        description="Judge records with the built-in invariants, and print the table, what failed and why. Records of "
        "cells of the same training are compared with each other. Exit code 1 if a record failed, or if none passed; 2 "
        "if a file cannot be read.",
    )
    command.set_defaults(run=run)
    command.add_argument("--invariants", nargs="+", default=[], metavar="MODULE:CLASS", help="your own invariants")
    command.add_argument("--waive", nargs="+", default=[], metavar="INVARIANT", help="those whose violation you accept")
    command.add_argument("--strict", action="store_true", help="exit code 1 also if a record is not evaluated")
    add_files(command)


def run(options: argparse.Namespace) -> int:
    """Judge the records, and print the table and what failed."""
    from pytest_sftguard import reports
    from pytest_sftguard.invariants import load_invariants
    from pytest_sftguard.reports._screen import Screen
    from pytest_sftguard.verdicts import JudgedRun, judge

    try:
        invariants = load_invariants(options.invariants)
    except registry.NotFoundError as error:
        raise MisuseError(f"--invariants: {error}") from None
    found = bundles.collect(options.files)
    runs = []
    for name, record in found:
        references = bundles.references(record, [r for _, r in found])
        verdict = judge(record, invariants, references, options.waive, strict=options.strict)
        runs.append((name, JudgedRun(record, verdict, references), ""))
    for lines in reports.call("section", runs, Screen()):
        print(*lines, sep="\n")
    failed = sum(bool(run.verdict.failures) for _, run, _ in runs)
    passed = sum(run.verdict.passed for _, run, _ in runs)
    print(f"{records(len(runs))}: {passed} passed, {failed} failed, {len(runs) - passed - failed} not evaluated")
    return 1 if failed or not passed or (options.strict and passed < len(runs)) else 0
