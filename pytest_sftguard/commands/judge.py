"""`judge`: the verdict on records that were made elsewhere or earlier."""

from __future__ import annotations

import argparse
from typing import Any

from pytest_sftguard import bundles, registry
from pytest_sftguard.commands.reading import MisuseError, add_paths


def add(commands: Any) -> None:
    """Add the subcommand to `commands`, argparse's subparsers."""
    command = commands.add_parser(
        "judge",
        help="judge records that were made elsewhere or earlier",
        description="Judge run records with the built-in invariants, siblings among them being references for each "
        "other, and print the table, what failed and why. Exit code 1 if a record failed, or none passed; 2 if "
        "something cannot be read.",
    )
    command.set_defaults(run=run)
    command.add_argument("--invariants", nargs="+", default=[], metavar="MODULE:CLASS", help="your own beside them")
    command.add_argument("--waive", nargs="+", default=[], metavar="INVARIANT", help="invariants known not to hold")
    command.add_argument("--strict", action="store_true", help="exit code 1 if a record could not be evaluated, too")
    add_paths(command)


def run(options: argparse.Namespace) -> int:
    """Judge records again: print the table and what failed."""
    from pytest_sftguard.invariants import load_invariants
    from pytest_sftguard.reports import terminal
    from pytest_sftguard.verdicts import JudgedRun
    from pytest_sftguard.verdicts import judge as judge_record

    try:
        invariants = load_invariants(options.invariants)
    except registry.NotFoundError as error:
        raise MisuseError(f"--invariants: {error}") from None
    named = bundles.collect(options.paths)
    runs = []
    for name, record in named:
        references = bundles.references(record, [r for _, r in named])
        verdict = judge_record(record, invariants, references, options.waive)
        runs.append((name, JudgedRun(record, verdict, references), ""))
    for line in terminal.lines(runs):
        print(line)
    failed = sum(bool(run.verdict.failures) for _, run, _ in runs)
    passed = sum(run.verdict.passed for _, run, _ in runs)
    print(f"{len(runs)} records: {passed} passed, {failed} failed, {len(runs) - passed - failed} not evaluated")
    return 1 if failed or not passed or (options.strict and passed < len(runs)) else 0
