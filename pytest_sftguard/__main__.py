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
    from pytest_sftguard.hardware import HardwareProfile

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
