"""`python -m pytest_sftguard`: one thin subcommand for each capability that needs no test."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_sftguard import bundles, registry, sizes
from pytest_sftguard.matrix import parse_batch
from pytest_sftguard.precision import MODES, mode_named
from pytest_sftguard.records import RecordError
from pytest_sftguard.settings import BUILT_IN_TARGET

if TYPE_CHECKING:
    from pytest_sftguard.detection import Detection
    from pytest_sftguard.engine.faults import Fault
    from pytest_sftguard.hardware import HardwareProfile

FAULTS_TARGET = "pytest_sftguard.engine.models.sums:build_trainer"
"""Target of the fault library where none is named: it has questions, so that wrong answers show."""
MACHINE = ("auto", "cpu", "cuda")
"""What `--device` calls this machine's own devices."""


class MisuseError(Exception):
    """Something that the user asked for and cannot have; the message says what is valid."""


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
    except BrokenPipeError:  # the reader has gone, as `head` does
        sys.stdout = None
        return 1
    return code


def judge(options: argparse.Namespace) -> int:
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
    runs = [(name, JudgedRun(record, judge_record(record, invariants)), "") for name, record in named]
    for line in terminal.lines(runs):
        print(line)
    failed = sum(bool(run.verdict.failures) for _, run, _ in runs)
    passed = sum(run.verdict.passed for _, run, _ in runs)
    print(f"{len(runs)} records: {passed} passed, {failed} failed, {len(runs) - passed - failed} not evaluated")
    return 1 if failed or not passed or (options.strict and passed < len(runs)) else 0


def bundle(options: argparse.Namespace) -> int:
    """Write one file with all records."""
    named = bundles.collect(options.paths)
    try:
        bundles.write(options.output, named)
    except OSError as error:
        raise MisuseError(f"{options.output} cannot be written: {error.strerror or error}") from None
    print(f"{len(named)} records in {options.output}")
    return 0


def fit(options: argparse.Namespace) -> int:
    """Say which micro-batches fit, by rehearsing the training without its memory."""
    try:
        from pytest_sftguard.engine import fitting
        from pytest_sftguard.engine.targets import TargetError, resolve
    except ImportError as error:
        raise MisuseError(f"fit needs torch, transformers, accelerate and peft, and one is missing: {error}") from None
    try:
        resolve(options.target)
    except TargetError as error:
        raise MisuseError(str(error)) from None
    profile = _profile(options)
    free = options.memory if options.memory is not None else fitting.free(profile, here=options.device in MACHINE)
    if free is None:
        raise MisuseError(f"the memory of {profile.name} cannot be read: give it with --memory")
    whose = "given" if options.memory is not None else "free"
    print(f"{profile.name}: {sizes.format_bytes(free)} {whose}, margin {options.margin:.0%}; target {options.target}")
    question = fitting.Question(
        target=options.target, model=options.model, profile=profile, free=free, margin=options.margin,
        batches=tuple(options.batch), accumulation=options.accumulation, longest=not options.first_batch,
        limit=options.limit,
    )  # fmt: skip
    any_fits = False
    try:
        for name in options.precision or MODES:
            answer = fitting.ask(question, mode_named(name))
            print(answer, flush=True)
            any_fits = any_fits or bool(answer.largest)
    except TargetError as error:
        raise MisuseError(str(error)) from None
    return 0 if any_fits else 1


def faults(options: argparse.Namespace) -> int:
    """Try the fault library on a target, and print what the guard made of it."""
    from pytest_sftguard import detection

    try:
        known = detection.names()
        chosen = [detection.fault_named(n) for n in options.faults or known]
        if options.list:
            for fault in chosen:
                print(f"{fault.id}\n    {fault.injects}\n    {fault.source}")
            return 0
        from pytest_sftguard.engine.targets import TargetError, resolve
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
    return detection.Detection(options.target, (*plain, *detection.beside(faulty, plain)))


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


def _cores() -> int:
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _profile(options: argparse.Namespace) -> HardwareProfile:
    """The device that is asked about: this machine's, or a known one by its name."""
    from pytest_sftguard import hardware

    if options.device not in MACHINE:
        named = getattr(hardware, "device_named", None)
        if named is None:
            raise MisuseError(
                f"--device {options.device!r}: this version knows no devices by name; "
                f"choose from {', '.join(MACHINE)}, or give --memory alone"
            )
        try:
            found: HardwareProfile = named(options.device)
        except (LookupError, ValueError) as error:
            raise MisuseError(f"--device: {error.args[0] if error.args else error}") from None
        return found
    if options.memory is not None and options.device == "auto":
        return hardware.HardwareProfile(kind="cuda", name="a CUDA device")
    from pytest_sftguard.engine.probe import choose_device, probe

    kind, unavailable = choose_device(options.device)
    if unavailable:
        raise MisuseError(f"--device {options.device}: {unavailable}")
    return probe(kind)


def _read(reader: Any) -> Any:
    """A reader of ours as argparse wants it, its message kept."""

    def read(text: str) -> Any:
        try:
            return reader(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


def _share(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < 1:
        raise ValueError(f"{text!r} is no share: give a number from 0 up to 1, such as {sizes.DEFAULT_MARGIN}")
    return number


def _whole(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) >= 1):
        raise ValueError(f"{text!r} is no whole number from 1 on")
    return int(text)


def _batches(text: str) -> list[int]:
    found = [parse_batch(item) for item in text.replace(",", " ").split()]
    if not found or any(b.accumulation is not None for b in found):
        raise ValueError(f"{text!r} is no list of micro-batches: write numbers such as 1,2,4,8")
    return sorted({b.per_device for b in found})


def _precisions(text: str) -> list[str]:
    return [mode_named(item).name for item in text.replace(",", " ").split()]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pytest_sftguard",
        description="Numerical stability of LoRA fine-tuning, outside of pytest.",
        epilog="exit codes: 0 all is well; 1 something failed, or nothing fits; 2 an error of use or of a file",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser(
        "fit",
        help="which micro-batches fit into memory, in which precision",
        description="Predict the peak memory of the target's training at several micro-batches, without allocating it, "
        "and print for each precision what fits and the largest micro-batch that does. The training itself is "
        "rehearsed on tensors that have no memory; only the weights are loaded, into host memory.",
        epilog="example: python -m pytest_sftguard fit --target homework.sft:build_trainer --memory 15.8GiB",
    )
    command.set_defaults(run=fit)
    command.add_argument(
        "--target", default=BUILT_IN_TARGET, metavar="MODULE:FUNCTION",
        help="the function that builds the Trainer (default: a tiny built-in model)",
    )  # fmt: skip
    command.add_argument("--model", metavar="NAME", help="folder or hub id that the target loads (default: its own)")
    command.add_argument(
        "--device", default="auto", metavar="NAME",
        help="auto (this machine's GPU or else CPU), cpu, cuda, or a known device such as T4 (default: auto)",
    )  # fmt: skip
    command.add_argument(
        "--memory", type=_read(sizes.parse_bytes), metavar="SIZE",
        help="free memory to go by, such as 15.8GiB, in place of the device's; without --device, of a CUDA device",
    )  # fmt: skip
    command.add_argument(
        "--precision", type=_read(_precisions), metavar="MODES", help=f"of {', '.join(MODES)} (default: all)"
    )
    command.add_argument(
        "--batch", type=_read(_batches), default=[1, 2, 4, 8, 16, 32], metavar="NUMBERS",
        help="micro-batches to show (default: 1,2,4,8,16,32)",
    )  # fmt: skip
    command.add_argument(
        "--accumulation", type=_read(_whole), default=2, metavar="N",
        help="micro-batches per optimizer step: from the second on, gradients are there already (default: 2)",
    )  # fmt: skip
    command.add_argument(
        "--limit", type=_read(_whole), default=1024, metavar="N", help="largest micro-batch to try (default: 1024)"
    )
    command.add_argument(
        "--margin", type=_read(_share), default=sizes.DEFAULT_MARGIN, metavar="SHARE",
        help=f"share of the memory to leave alone (default: {sizes.DEFAULT_MARGIN})",
    )  # fmt: skip
    command.add_argument(
        "--first-batch", action="store_true",
        help="take the first batch that the Trainer draws, instead of the longest rows of the dataset",
    )  # fmt: skip

    command = commands.add_parser(
        "faults",
        help="inject known failures into a target's training, and see whether the guard reports them",
        description="Train the target once for each fault of the library, with that failure of LoRA fine-tuning in it, "
        "and print whether the guard caught it, by which invariant, at which step, and whether it named the mechanism; "
        "then the rates, and the false alarms on the target as it is. Exit code 1 if anything was missed, or reported "
        "of a healthy training.",
        epilog="example: python -m pytest_sftguard faults --target my_project.train:build_trainer --json faults.json",
    )
    command.set_defaults(run=faults)
    command.add_argument("faults", nargs="*", metavar="FAULT", help="ids of faults (default: the whole library)")
    command.add_argument(
        "--list", action="store_true", help="print the faults, what they inject and where people met it"
    )
    command.add_argument(
        "--target", default=FAULTS_TARGET, metavar="MODULE:FUNCTION",
        help="the function that builds the Trainer (default: a tiny built-in model that learns to add)",
    )  # fmt: skip
    command.add_argument(
        "--device", default="cpu", choices=("cpu", "cuda"), help="where the trainings run (default: cpu)"
    )
    command.add_argument(
        "--jobs",
        type=_read(_whole),
        default=_cores(),
        metavar="N",
        help="processes at a time (default: one for each core)",
    )
    command.add_argument("--json", type=Path, metavar="FILE", help="write every attempt to this file")
    command.add_argument("--markdown", type=Path, metavar="FILE", help="write the table to this file")

    command = commands.add_parser(
        "judge",
        help="judge records that were made elsewhere or earlier",
        description="Judge run records with the built-in invariants and print the table, what failed and why. Exit "
        "code 1 if a record failed, or none passed; 2 if something cannot be read.",
    )
    command.set_defaults(run=judge)
    command.add_argument("--invariants", nargs="+", default=[], metavar="MODULE:CLASS", help="your own beside them")
    command.add_argument("--strict", action="store_true", help="exit code 1 if a record could not be evaluated, too")
    _add_paths(command)

    command = commands.add_parser(
        "bundle",
        help="put records into one file, to bring home from the machine that made them",
        description="Write all records into one file, which `judge` reads. The file is written whole or not at all.",
    )
    command.set_defaults(run=bundle)
    command.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the file to write")
    _add_paths(command)
    return parser


def _add_paths(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "paths", type=Path, nargs="+", metavar="PATH", help="a record, a bundle, or a folder such as .sftguard"
    )


if __name__ == "__main__":
    sys.exit(main())
