"""`faults`: whether the guard reports what the fault library injects into a target."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_sftguard import registry
from pytest_sftguard.commands.reading import MisuseError, read, whole
from pytest_sftguard.hardware import usable_cores

if TYPE_CHECKING:
    from pytest_sftguard.detection import Detection
    from pytest_sftguard.engine.faults import Fault

TARGET = "pytest_sftguard.engine.models.sums:build_trainer"
"""Target where none is named: it has questions, so that wrong answers show."""


def add(commands: Any) -> None:
    """Add the subcommand to `commands`, argparse's subparsers."""
    command = commands.add_parser(
        "faults",
        help="inject known failures into a target's training, and see whether the guard reports them",
        description="Train the target once for each fault of the library, with that failure of LoRA fine-tuning in it, "
        "and print whether the guard caught it, by which invariant, at which step, and whether it named the mechanism; "
        "then the rates, and the false alarms on the target as it is. Exit code 1 if anything was missed, or reported "
        "of a healthy training.",
        epilog="example: python -m pytest_sftguard faults --target my_project.train:build_trainer --json faults.json",
    )
    command.set_defaults(run=run)
    command.add_argument("faults", nargs="*", metavar="FAULT", help="ids of faults (default: the whole library)")
    command.add_argument(
        "--list", action="store_true", help="print the faults, what they inject and where people met it"
    )
    command.add_argument(
        "--target", default=TARGET, metavar="MODULE:FUNCTION",
        help="the function that builds the Trainer (default: a tiny built-in model that learns to add)",
    )  # fmt: skip
    command.add_argument(
        "--device", default="cpu", choices=("cpu", "cuda"), help="where the trainings run (default: cpu)"
    )
    command.add_argument(
        "--jobs",
        type=read(whole),
        default=usable_cores(),
        metavar="N",
        help="processes at a time (default: one for each core)",
    )
    command.add_argument("--json", type=Path, metavar="FILE", help="write every attempt to this file")
    command.add_argument("--markdown", type=Path, metavar="FILE", help="write the table to this file")


def run(options: argparse.Namespace) -> int:
    """Try the fault library on a target, and print what the guard made of it."""
    from pytest_sftguard import detection

    try:
        known = detection.names()
        chosen = [detection.fault_named(n) for n in options.faults or known]
        if options.list:
            for fault in chosen:
                print(f"{fault.id}\n    {fault.injects}\n    {fault.source}")
            return 0
        from pytest_sftguard.engine.building.targets import TargetError, resolve
    except ImportError as error:
        raise MisuseError(f"faults needs torch, transformers, accelerate and peft: {error}") from None
    except registry.NotFoundError as error:
        raise MisuseError(str(error)) from None
    try:
        resolve(options.target)
    except TargetError as error:
        raise MisuseError(str(error)) from None
    for path in (options.json, options.markdown):
        if path is not None and not path.resolve().parent.is_dir():
            raise MisuseError(f"{path} cannot be written: there is no folder {path.resolve().parent}")
    found = _try_faults(options, chosen)
    _print_table([detection.HEADINGS, *map(detection.row, found.attempts)])
    for attempt in (*found.missed, *found.false_alarms):
        print(f"\n{attempt.fault}: {attempt.injects}")
        print(f"    {'expected ' + ', '.join(attempt.expected) if attempt.expected else 'expected nothing'}")
        print(
            f"    reported {', '.join(attempt.reported) or 'nothing'}"
            + (f": {attempt.message}" * bool(attempt.message))
        )
    print()
    for line in found.summary():
        print(line)
    _write_detection(options, found)
    return 0 if found.sound else 1


def _try_faults(options: argparse.Namespace, chosen: Sequence[Fault]) -> Detection:
    """Every fault, after the target as it is in each of their precisions."""
    from tqdm import tqdm

    from pytest_sftguard import detection

    plainly = sorted({(f.precision, f.asks) for f in chosen})
    tasks: list[tuple[Any, tuple[Any, ...]]] = [
        *((detection.healthy, (options.target, precision, asks, options.device)) for precision, asks in plainly),
        *((detection.attempt, (fault.id, options.target, options.device)) for fault in chosen),
    ]
    with tqdm(total=len(tasks), unit="fault", disable=None, file=sys.stderr) as bar:

        def done(attempt: detection.Attempt) -> None:
            bar.set_postfix_str(attempt.fault, refresh=False)
            bar.update()

        attempts = detection.run_all(tasks, min(options.jobs, len(tasks)), done)
    plain, faulty = attempts[: len(plainly)], attempts[len(plainly) :]
    return detection.Detection(options.target, (*plain, *detection.beside(faulty, plain)), options.device)


def _write_detection(options: argparse.Namespace, found: Detection) -> None:
    import json

    from pytest_sftguard import detection
    from pytest_sftguard.records import write_text

    try:
        if options.json is not None:
            write_text(options.json, json.dumps(found.to_dict(), indent=1) + "\n")
        if options.markdown is not None:
            write_text(options.markdown, "\n".join(detection.markdown(found)) + "\n")
    except OSError as error:
        raise MisuseError(f"{error.filename} cannot be written: {error.strerror or error}") from None


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())
