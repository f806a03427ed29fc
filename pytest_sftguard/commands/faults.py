"""`faults`: whether the guard reports what the fault library injects into a target, and what nobody has listed."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pytest_sftguard import registry, settings, tiers
from pytest_sftguard.commands.reading import MisuseError, read, whole
from pytest_sftguard.hardware import usable_cores

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
        "training was reported. "
        "--generate composes faults that are in no library instead, and --healthy trainings without a fault; both "
        "measure first, without the guard, that the fault has an effect or that the training learns. Each is replayed "
        "from its id with --replay.",
        epilog="examples: python -m pytest_sftguard faults --target my_project.train:build_trainer --json faults.json; "
        "python -m pytest_sftguard faults --generate 60 --seed 17 --tier quick,standard --resume trail.jsonl; "
        "python -m pytest_sftguard faults --replay fault-17-42 --tier standard",
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
    generated = command.add_argument_group(
        "what nobody has listed", "on tiny trainings of its own, so that --target and --device do not apply"
    )
    generated.add_argument(
        "--generate",
        type=read(whole),
        metavar="N",
        help="compose faults from a grammar of where, what, how much, when and to whom, until N have an effect above "
        "twice the noise; print what was missed, and the smallest perturbations that were detected",
    )
    generated.add_argument(
        "--healthy",
        type=read(whole),
        metavar="N",
        help="compose healthy trainings of many architectures, tasks, adapters and optimizers, until N learn; print "
        "what was reported of them",
    )
    generated.add_argument(
        "--seed", type=read(settings.whole(0)), metavar="S", help="what is composed depends on it alone (default: 0)"
    )
    generated.add_argument(
        "--tier",
        type=read(tier_names),
        metavar="TIERS",
        help="tiers in which they are judged, such as quick,standard (default: quick)",
    )
    generated.add_argument(
        "--resume",
        type=Path,
        metavar="FILE",
        help="add each of them to this file as it ends, and do not repeat those that it holds",
    )
    generated.add_argument(
        "--at-least",
        type=read(detected_share),
        metavar="SHARE",
        help="exit code 0 if this share of the composed faults is reported in each tier, such as 0.8 (default: 1)",
    )
    generated.add_argument(
        "--replay", metavar="ID", help="compose and judge one of them again, such as fault-17-42, and print the report"
    )


def tier_names(text: str) -> tuple[str, ...]:
    """Names of tiers, the cheapest first."""
    names = {name.strip() for name in text.split(",")}
    if not names <= tiers.TIERS.keys():
        raise ValueError(f"choose from {', '.join(tiers.TIERS)}, with commas between them")
    return tuple(name for name in tiers.TIERS if name in names)


def detected_share(text: str) -> float:
    """A share of the faults, above 0 and at most 1."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number <= 1:
        raise ValueError("give a share above 0 and at most 1, such as 0.8")
    return number


def run(options: argparse.Namespace) -> int:
    """Try the faults on a target, and print what the guard reports."""
    asked = [o for o in ("--generate", "--healthy", "--replay") if getattr(options, o.strip("-")) is not None]
    if options.at_least is not None and asked != ["--generate"]:
        raise MisuseError("--at-least is for composed faults, and needs --generate")
    if asked:
        return _generated(options, asked)
    for name in ("seed", "tier", "resume"):
        if getattr(options, name) is not None:
            raise MisuseError(f"--{name} needs --generate, --healthy or --replay: the library is judged in standard")
    return _library(options)


def _library(options: argparse.Namespace) -> int:
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
    _have_folders(options.json, options.markdown)
    found = detect(options.target, chosen, options.device, options.jobs)
    print(*tables.text(found), sep="\n")
    _write(options, found, tables.markdown)
    return 0 if found.sound else 1


def _generated(options: argparse.Namespace, asked: list[str]) -> int:
    """Compose faults or trainings, and print what the guard reports of them."""
    if len(asked) > 1:
        raise MisuseError(f"{' and '.join(asked)} cannot be combined: run one after the other")
    if options.faults or options.list or options.target != TARGET or options.device != "cpu":
        raise MisuseError(f"{asked[0]} composes its own: leave ids of faults, --list, --target and --device out")
    try:
        from pytest_sftguard.detection import generated, pages, study
    except ImportError as error:
        raise MisuseError(f"faults needs torch, transformers, accelerate and peft: {error}") from None
    chosen = options.tier or ("quick",)
    if options.replay is not None:
        return _replay(options.replay, chosen)
    _have_folders(options.json, options.markdown, options.resume)
    healthy = options.healthy is not None
    try:
        found = study.study(
            generated.healthy_trial if healthy else generated.fault_trial,
            options.healthy if healthy else options.generate,
            options.seed or 0,
            chosen,
            options.jobs,
            healthy=healthy,
            trail=options.resume,
        )
    except study.TrailError as error:
        raise MisuseError(str(error)) from None
    print(*pages.text(found), sep="\n")
    _write(options, found, pages.markdown)
    return 0 if found.sound(1.0 if options.at_least is None else options.at_least) else 1


def _replay(name: str, chosen: tuple[str, ...]) -> int:
    """Compose and judge one fault or training again, and print the guard's whole report."""
    from pytest_sftguard.detection import generated

    form = re.fullmatch(r"(fault|healthy)-(\d+)-(\d+)", name)
    if form is None:
        raise MisuseError(f"--replay {name!r} is no id: write fault-SEED-NUMBER or healthy-SEED-NUMBER")
    passed = True
    for line, fine in generated.replayed(form[1] == "healthy", int(form[2]), int(form[3]), chosen):
        print(line)
        passed = passed and fine
    return 0 if passed else 1


def _have_folders(*paths: Path | None) -> None:
    for path in paths:
        if path is not None and not path.resolve().parent.is_dir():
            raise MisuseError(f"{path} cannot be written: there is no folder {path.resolve().parent}")


def _write(options: argparse.Namespace, found: Any, markdown: Callable[[Any], Iterable[str]]) -> None:
    """Write the files that were asked for."""
    from pytest_sftguard.records import write_text

    try:
        if options.json is not None:
            write_text(options.json, json.dumps(found.to_dict(), indent=1) + "\n")
        if options.markdown is not None:
            write_text(options.markdown, "\n".join(markdown(found)) + "\n")
    except OSError as error:
        raise MisuseError(f"{error.filename} cannot be written: {error.strerror or error}") from None
