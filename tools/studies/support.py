"""What is judged: every task and adapter in health, and with faults planted in it; writes docs/support.md.

    python -m tools.studies.support [--jobs 2] [--markdown docs/support.md] [NAME ...]

A row of the table is what this run saw, in the tier `standard`.
"""

from __future__ import annotations

import argparse
import inspect
import platform
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pytest_sftguard import detection, tiers
from pytest_sftguard.detection import Attempt
from pytest_sftguard.invariants import load_invariants
from pytest_sftguard.matrix import Cell, RunConfig
from pytest_sftguard.records import write_text
from pytest_sftguard.session import CannotRunError, Runs
from pytest_sftguard.verdicts import Outcome
from tests.targets import adapters
from tests.targets.tasks import TASKS

PLANTED = {
    "data": "single-nonfinite-batch-poisons-run",
    "optimizer": "optimizer-does-not-own-adapter",
    "schedule": "schedule-runs-n-times-too-fast",
    "file": "nan-adapter-saved-and-served",
}
"""A fault of the library for each station of a training; each applies to any Trainer."""


@dataclass(frozen=True)
class Support:
    """What was seen of one target."""

    path: str
    """Dotted path of the target."""
    outcome: str
    """The verdict on it as it is, or why there is none."""
    alarms: tuple[str, ...] = ()
    """Invariants that failed on it as it is."""
    not_looked: tuple[str, ...] = ()
    """Looks that do not apply to it."""
    broken: tuple[str, ...] = ()
    """Looks that ended in an exception of their own."""
    missed: tuple[str, ...] = ()
    """Stations whose planted fault was not reported."""

    @property
    def sound(self) -> bool:
        """Whether it passed in health, without an exception of the guard, and failed with each fault."""
        return self.outcome == "passed" and not (self.alarms or self.broken or self.missed)


def supported(path: str, stations: Collection[str] = tuple(PLANTED)) -> Support:
    """Train the target at `path` as it is, and with the fault of each of `stations`."""
    looks, references = tiers.asked("standard")
    config = RunConfig(cell=Cell("fp32", 4, 1), target=path, steps=6, device="cpu", looks=looks)
    try:
        run = Runs().compared(config, load_invariants(), references)
    except CannotRunError as error:
        return Support(path, f"cannot run: {error}")
    missed = []
    for station in stations:
        found: Attempt = detection.attempt(PLANTED[station], path)
        if not found.skipped and not set(found.expected) & set(found.reported):
            missed.append(station)
    broken = {str(f.evidence["name"]) for f in run.verdict.findings if f.guards_own}
    return Support(
        path,
        run.verdict.outcome.value if run.verdict.outcome is not Outcome.FAILED else "failed",
        tuple(dict.fromkeys(f.invariant for f in run.verdict.failures)),
        tuple(look.name for look in run.record.looks if look.inapplicable),
        tuple(sorted(broken)),
        tuple(missed),
    )


def targets() -> dict[str, Callable[..., Any]]:
    """Every target of the table by its dotted path: the tasks, and then the methods of peft on one of them."""
    methods = [f for f in vars(adapters).values() if inspect.isfunction(f) and _is_target(f)]
    return {f"{f.__module__}:{f.__name__}": f for f in (*TASKS.values(), *methods)}


def _is_target(function: Callable[..., Any]) -> bool:
    """Whether a function of the module of methods is a target."""
    return function.__module__ == adapters.__name__ and [*inspect.signature(function).parameters] == ["arguments"]


def page(rows: Sequence[Support], seconds: float) -> str:
    """The documentation page."""
    import torch

    every = targets()
    lines = [
        "# What is judged",
        "",
        "Each row is a tiny training, made locally and trained in the tier `standard`: as it is, which must pass, and",
        f"with a fault at each of {len(PLANTED)} stations ({', '.join(PLANTED)}), which must fail. *Does not apply*",
        "names looks that need what the training does not have, such as questions; `-v` says why.",
        "",
        f"Made with `python -m tools.studies.support --markdown docs/support.md` in {seconds / 60:.0f} minutes on",
        f"{platform.machine()}, torch {torch.__version__}.",
        "",
        "| training | what it is | in health | faults caught | does not apply |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        what = (inspect.getdoc(every[row.path]) or "").splitlines()[0].rstrip(".")
        health = row.outcome + (f": {', '.join(row.alarms)}" if row.alarms else "")
        health += f"; broken: {', '.join(row.broken)}" if row.broken else ""
        caught = f"{len(PLANTED) - len(row.missed)} of {len(PLANTED)}"
        name = row.path.rpartition(":")[2]
        lines.append(f"| `{name}` | {what} | {health} | {caught} | {', '.join(row.not_looked) or '-'} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study; exit code 1 where a row is not as it must be."""
    parser = argparse.ArgumentParser(prog="python -m tools.studies.support", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="these alone (default: every one)")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time (default: 2)")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table to this file")
    options = parser.parse_args(arguments)
    paths = [p for p in targets() if not options.names or p.rpartition(":")[2] in options.names]
    started = time.perf_counter()
    with tqdm(total=len(paths), unit="training", file=sys.stderr) as bar:
        rows = detection.run_all([(supported, (p,)) for p in paths], options.jobs, lambda row: bar.update())
    text = page(rows, time.perf_counter() - started)
    print(text)
    if options.markdown:
        write_text(options.markdown, text)
    return 0 if all(row.sound for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
