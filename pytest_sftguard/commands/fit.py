"""`fit`: says which micro-batches fit into memory, in which precision."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from pytest_sftguard import sizes
from pytest_sftguard.commands.reading import MisuseError, batches, read, whole
from pytest_sftguard.precision import MODES, mode_named
from pytest_sftguard.settings import BUILT_IN_TARGET, precisions, share

if TYPE_CHECKING:
    from pytest_sftguard.hardware import HardwareProfile

MACHINE = ("auto", "cpu", "cuda")
"""Values of `--device` that stand for this machine's own devices."""


def add(commands: Any) -> None:
    """Add the subcommand to `commands`, argparse's subparsers."""
    command = commands.add_parser(
        "fit",
        help="say which micro-batches fit into memory, in which precision",
        description="Predict the peak memory of the target's training at several micro-batches, and print for each "
        "precision which of them fit and the largest micro-batch that does. The training is rehearsed on tensors "
        "without memory; only the weights are loaded, into host memory. Exit code 1 if nothing fits.",
        epilog="example: python -m pytest_sftguard fit --target homework.sft:build_trainer --memory 15.8GiB",
    )
    command.set_defaults(run=run)
    option = command.add_argument
    option(
        "--target",
        default=BUILT_IN_TARGET,
        metavar="MODULE:FUNCTION",
        help="the function that builds the Trainer (default: a tiny built-in model)",
    )
    option("--model", metavar="NAME", help="folder or hub id that the target loads (default: its own)")
    option(
        "--device",
        default="auto",
        metavar="NAME",
        help="auto (this machine's GPU, or else CPU), cpu, cuda, or a known device such as T4 (default: %(default)s)",
    )
    option(
        "--memory",
        type=read(sizes.parse_bytes),
        metavar="SIZE",
        help="free memory, such as 15.8GiB, instead of the device's; without --device, of a CUDA device",
    )
    option("--precision", type=read(precisions), metavar="MODES", help=f"precision modes (default: {','.join(MODES)})")
    option(
        "--batch",
        type=read(batches),
        default="1,2,4,8,16,32",
        metavar="NUMBERS",
        help="micro-batches to show (default: %(default)s)",
    )
    option(
        "--accumulation",
        type=read(whole),
        default=2,
        metavar="N",
        help="micro-batches per optimizer step; from the second on, gradients occupy memory (default: %(default)s)",
    )
    option(
        "--limit", type=read(whole), default=1024, metavar="N", help="largest micro-batch to try (default: %(default)s)"
    )
    option(
        "--margin",
        type=read(share),
        default=sizes.DEFAULT_MARGIN,
        metavar="SHARE",
        help="share of the memory to leave unused (default: %(default)s)",
    )
    option(
        "--first-batch",
        action="store_true",
        help="take the first batch that the Trainer draws, instead of the longest rows of the dataset",
    )


def run(options: argparse.Namespace) -> int:
    """Say which micro-batches fit, by rehearsing the training without its memory."""
    try:
        from pytest_sftguard.engine.building.targets import TargetError, resolve
        from pytest_sftguard.engine.memory import fitting
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
        target=options.target,
        model=options.model,
        profile=profile,
        free=free,
        margin=options.margin,
        batches=tuple(options.batch),
        accumulation=options.accumulation,
        longest=not options.first_batch,
        limit=options.limit,
    )
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
    """The device of `--device`: this machine's, or a known one by its name."""
    from pytest_sftguard import hardware

    if options.device not in MACHINE:
        try:
            return hardware.device_named(options.device)
        except ValueError as error:
            raise MisuseError(f"--device: {error}, {', '.join(MACHINE)}") from None
    if options.memory is not None and options.device == "auto":
        return hardware.HardwareProfile(device_type="cuda", name="a CUDA device")
    from pytest_sftguard.engine.machine.profiles import choose_device, device_profile

    device_type, unavailable = choose_device(options.device)
    if unavailable:
        raise MisuseError(f"--device {options.device}: {unavailable}")
    return device_profile(device_type)
