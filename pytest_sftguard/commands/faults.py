"""`faults`: whether the guard reports what the fault library injects into a target."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_sftguard import registry
from pytest_sftguard.commands.reading import MisuseError, read, whole
from pytest_sftguard.hardware import usable_cores

if TYPE_CHECKING:
    from pytest_sftguard.detection import Detection

TARGET = "pytest_sftguard.engine.models.sums:build_trainer"
"""Target if none is named: it asks questions, so that wrong answers show."""


def add(commands: Any) -> None:
    """Add the subcommand to `commands`, argparse's subparsers."""
    command = commands.add_parser(
        "faults",
        help="inject known failures into a target's training, and see whether the guard reports them",
        description="Train the target once for each fault of the library, with that failure of LoRA fine-tuning in it. "
        "Print whether the guard caught it, by which invariant, at which step, and whether it named the mechanism; "
        "then the rates, and the false alarms on the target as it is. Exit code 1 if a fault was missed or a healthy "
        "training was reported.",
        epilog="example: python -m pytest_sftguard faults --target my_project.train:build_trainer --json faults.json",
    )
    command.set_defaults(run=run)
    command.add_argument("faults", nargs="*", metavar="FAULT", help="ids of faults (default: the whole library)")
    command.add_argument(
        "--list", action="store_true", help="print the faults, what each injects, and a report of somebody who met it"
    )
    command.add_argument(
        "--target",
        default=TARGET,
        metavar="MODULE:FUNCTION",
        help="the function that builds the Trainer (default: a tiny built-in model that learns to add)",
    )
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
    """Try the faults on a target, and print what the guard reports."""
    from pytest_sftguard.detection import detect, tables

    try:
        from pytest_sftguard.engine.building.targets import TargetError, resolve
        from pytest_sftguard.engine.faults import fault_named, load_faults

        chosen = [fault_named(name) for name in options.faults] or [fault() for fault in load_faults()]
    except ImportError as error:
        raise MisuseError(f"faults needs torch, transformers, accelerate and peft: {error}") from None
    except registry.NotFoundError as error:
        raise MisuseError(str(error)) from None
    if options.list:
        for fault in chosen:
            print(f"{fault.id}\n    {fault.injects}\n    {fault.source}")
        return 0
    try:
        resolve(options.target)
    except TargetError as error:
        raise MisuseError(str(error)) from None
    for path in (options.json, options.markdown):
        if path is not None and not path.resolve().parent.is_dir():
            raise MisuseError(f"{path} cannot be written: there is no folder {path.resolve().parent}")
    found = detect(options.target, chosen, options.device, options.jobs)
    print(*tables.text(found), sep="\n")
    _write(options, found)
    return 0 if found.sound else 1


def _write(options: argparse.Namespace, found: Detection) -> None:
    """Write the files that were asked for."""
    from pytest_sftguard.detection import tables
    from pytest_sftguard.records import write_text

    try:
        if options.json is not None:
            write_text(options.json, json.dumps(found.to_dict(), indent=1) + "\n")
        if options.markdown is not None:
            write_text(options.markdown, "\n".join(tables.markdown(found)) + "\n")
    except OSError as error:
        raise MisuseError(f"{error.filename} cannot be written: {error.strerror or error}") from None
