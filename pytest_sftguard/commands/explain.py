"""`explain`: says what a log that already exists shows of its training, and what it cannot show."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pytest_sftguard.commands.reading import MisuseError
from pytest_sftguard.logs.judging import Statement, Weight, cannot_show, explain
from pytest_sftguard.logs.reading import LogError, read
from pytest_sftguard.logs.series import Log

WIDTH = 80
"""Longest line, in characters."""
GUARD = "pytest -m gpu_stability --sftguard-target=MODULE:FUNCTION"
"""The command that looks at what no log holds."""
Explained = tuple[Log, Sequence[Statement]]
"""A log, and what it shows."""


def add(commands: Any) -> None:
    """Add the subcommand to `commands`, argparse's subparsers."""
    command = commands.add_parser(
        "explain",
        help="say what a training's log shows, and what it cannot show",
        description="Read the log of a training that has already run: trainer_state.json, a checkpoint or output "
        "folder, a log_history as JSON or JSON lines, saved output of the script, or TensorBoard's event files. Print "
        "what it shows, the worst first, each with its steps, its numbers and what to do next; then what it cannot "
        "show. An alarm says that the training is broken, a doubt that one reading of the log is a failure, a note "
        "that there is an ordinary reason. A log without an alarm is no evidence that the training works: this "
        "command gives no such verdict. Exit code 1 if there is an alarm in one of the logs; 2 if a file cannot be "
        "read as a log.",
        epilog="examples: python -m pytest_sftguard explain outputs/checkpoint-500; "
        "python train.py 2>&1 | tee train.log; python -m pytest_sftguard explain train.log --json",
    )
    command.set_defaults(run=run)
    command.add_argument("files", type=Path, nargs="+", metavar="FILE", help="a log, or a folder with one in it")
    command.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(options: argparse.Namespace) -> int:
    """Print what each log shows and cannot show; 1 where something alarms."""
    try:
        logs = [read(path) for path in options.files]
    except LogError as error:
        raise MisuseError(" ".join(str(error).split())) from None
    explained = [(log, explain(log)) for log in logs]
    alarming = any(s.weight is Weight.ALARM for _, statements in explained for s in statements)
    if options.json:
        found = {"schema": 1, "alarming": alarming, "logs": [_data(*item) for item in explained], "next": GUARD}
        print(json.dumps(found, indent=1, allow_nan=False))
    else:
        print(*_text(explained), sep="\n")
    return 1 if alarming else 0


def _data(log: Log, statements: Sequence[Statement]) -> dict[str, Any]:
    return {
        "file": log.source,
        "format": log.form,
        "entries": len(log.entries),
        "steps": _steps(log),
        "statements": [vars(s) | {"weight": s.weight.name.lower()} for s in statements],
        "cannot_show": list(cannot_show(log)),
    }


def _text(explained: Sequence[Explained]) -> Iterator[str]:
    from pytest_sftguard.reports._screen import Screen

    screen = Screen(width=WIDTH)
    for log, statements in explained:
        steps = _steps(log)
        span = "steps not numbered" if steps is None else f"steps {steps[0]} to {steps[1]}"
        number = len(log.entries)
        yield from screen.wrap(_plain(log.source))
        yield f"  read         {log.form}, {number} {'entry' if number == 1 else 'entries'}, {span}"
        yield "  shows"
        if not statements:
            yield from screen.wrap("    nothing alarming. That is no verdict: see what it cannot show.")
        for s in statements:
            where = f"{s.where}: " if s.where else ""
            label = s.weight.name.lower()
            yield from screen.wrap(f"    {label:9}{_plain(where + s.text)}", " " * 13)
            yield from screen.wrap(f"             next: {s.next}", " " * 19)
        yield "  cannot show"
        for sentence in cannot_show(log):
            yield from screen.wrap(f"    - {sentence}", "      ")
        yield ""
    yield "next: the guard looks at losses, gradients and weights at their source"
    yield f"  {GUARD}"


def _plain(text: str) -> str:
    """A text of the log on a line of its own, without characters that steer a terminal."""
    return "".join(c if c.isprintable() else " " for c in text)


def _steps(log: Log) -> tuple[int, int] | None:
    steps = [e.step for e in log.entries if e.step is not None]
    return (min(steps), max(steps)) if steps else None
