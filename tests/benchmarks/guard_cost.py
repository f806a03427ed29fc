"""Measures what watching costs in each step, beside other ways to find a NaN, and writes the table of docs/cost.md.

    python -m tests.benchmarks.guard_cost          (ten minutes on one core)
    python -m tests.benchmarks.guard_cost --write  (and puts the table into docs/cost.md)

Every way trains the app's embedded model, in one process and one thread. The ways take turns, round by round, in an
order that rotates, so that whatever else the machine does meets all of them. A step is the time from the end of one to
the end of the next, the data loader's included. The processor's time is beside the wall's: other programs slow the wall
down, and the processor less.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import TrainerCallback
from transformers.debug_utils import DebugUnderflowOverflow

from pytest_sftguard.engine.building import build
from pytest_sftguard.engine.isolation import isolated
from pytest_sftguard.engine.probe import probe
from pytest_sftguard.engine.probes import Probes, Scene
from pytest_sftguard.engine.recording import Recorder
from pytest_sftguard.engine.targets import resolve
from pytest_sftguard.engine.watching import Watch
from pytest_sftguard.matrix import Cell, RunConfig
from pytest_sftguard.precision import mode_named
from pytest_sftguard.tiers import TIERS
from tests.benchmarks.pages import put

PAGE = Path(__file__).resolve().parents[2] / "docs" / "cost.md"
TARGET = "homework.sft:build_trainer"
WARM_UP = 3
"""Steps at the start of a round that are not counted: the first of them makes the optimizer's states."""


@contextlib.contextmanager
def bare(trainer: Any, scene: Scene) -> Iterator[None]:
    """Nothing."""
    yield


@contextlib.contextmanager
def quick(trainer: Any, scene: Scene) -> Iterator[None]:
    """The guard as tier `quick` watches a cell."""
    with _guarded(trainer, scene, TIERS["quick"].looks):
        yield


@contextlib.contextmanager
def replay(trainer: Any, scene: Scene) -> Iterator[None]:
    """The same, and every step replayed in float32."""
    with _guarded(trainer, scene, (*TIERS["quick"].looks, "replay")):
        yield


@contextlib.contextmanager
def anomaly(trainer: Any, scene: Scene) -> Iterator[None]:
    """What torch offers: every backward function's results are looked at."""
    with torch.autograd.set_detect_anomaly(True):
        yield


@contextlib.contextmanager
def underflow(trainer: Any, scene: Scene) -> Iterator[None]:
    """What transformers offers: the inputs, weights and results of every module are looked at."""
    with contextlib.redirect_stdout(None):
        DebugUnderflowOverflow(trainer.model)
    yield


@contextlib.contextmanager
def _guarded(trainer: Any, scene: Scene, looks: tuple[str, ...]) -> Iterator[None]:
    probes = Probes(looks)
    probes.prepare(scene)
    scene.recorder = Recorder(trainer.model)
    scene.watch = Watch(trainer, scene.recorder)
    probes.attach(scene)
    yield
    scene.watch.detach()
    assert len(scene.recorder.steps) == trainer.args.max_steps


WAYS: dict[str, tuple[Callable[[Any, Scene], Any], str]] = {
    "bare": (bare, "the Trainer alone"),
    "quick": (quick, "guard, tier `quick`"),
    "replay": (replay, "guard, tier `quick` and look `replay`"),
    "anomaly": (anomaly, "`torch.autograd.set_detect_anomaly(True)`"),
    "underflow": (underflow, "`transformers` `DebugUnderflowOverflow`"),
}


class Clock(TrainerCallback):
    """Notes when each step ends."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.processor: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """A step is over."""
        self.wall.append(time.perf_counter())
        self.processor.append(time.process_time())


@dataclasses.dataclass
class Times:
    """Seconds of each step of one round."""

    wall: list[float]
    processor: list[float]


def one_round(way: str, cell: Cell, steps: int) -> Times:
    """Train once."""
    config = RunConfig(cell=cell, target=TARGET, device="cpu", steps=steps + WARM_UP)
    mode, target = mode_named("fp32"), resolve(TARGET)
    with isolated(), tempfile.TemporaryDirectory() as folder:

        def again(name: str, **arguments: Any) -> Any:
            given = dataclasses.replace(config, training_arguments={**config.training_arguments, **arguments})
            return build(target, given, mode, "cpu", Path(folder) / name)

        trainer = again("training")
        trainer.log = lambda *_, **__: None
        scene = Scene(config, mode, "cpu", target, Path(folder), again)
        scene.trainer = trainer
        clock = Clock()
        with WAYS[way][0](trainer, scene):
            trainer.add_callback(clock)
            trainer.train()
    return Times(*(_between(times[WARM_UP - 1 :]) for times in (clock.wall, clock.processor)))


def _between(times: list[float]) -> list[float]:
    return [b - a for a, b in itertools.pairwise(times)]


def measured(ways: list[str], cell: Cell, rounds: int, steps: int) -> dict[str, list[Times]]:
    """Every way, round by round."""
    for way in ways:  # whatever is loaded and made once
        one_round(way, cell, 1)
    found: dict[str, list[Times]] = {way: [] for way in ways}
    for i in range(rounds):
        turn = i % len(ways)
        for way in ways[turn:] + ways[:turn]:
            found[way].append(one_round(way, cell, steps))
        print(
            f"{cell}, round {i + 1} of {rounds}: " + ", ".join(f"{w} {_middle(t[-1].wall)}" for w, t in found.items())
        )
        sys.stdout.flush()
    return found


def table(found: dict[str, dict[str, list[Times]]], steps: int) -> str:
    """Markdown, with a line on where and how; `found` by cell and way."""
    lines = [
        "| cell | | step, wall (ms) | quartiles | processor (ms) | wall / bare | processor / bare | single rounds |",
        "|---|---|---|---|---|---|---|---|",
        *(row for cell, by_way in found.items() for row in _rows(cell, by_way)),
    ]
    rounds = len(next(iter(found.values()))["bare"])
    device = probe("cpu")
    lines += [
        "",
        f"{device.name}, {_cores()} cores, one thread, load {os.getloadavg()[0]:.1f} at the end; Python"
        f" {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}."
        f" {rounds} rounds of {steps} steps for each; medians of all steps, quartiles of the wall, and the medians of"
        " the rounds' ratios, of the processor with the smallest and the largest.",
    ]
    return "\n".join(lines)


def _rows(cell: str, found: dict[str, list[Times]]) -> Iterator[str]:
    for way, times in found.items():
        wall = [s for t in times for s in t.wall]
        low, _, high = statistics.quantiles(wall, n=4)
        ratios = {
            kind: [
                statistics.median(getattr(t, kind)) / statistics.median(getattr(b, kind))
                for t, b in zip(times, found["bare"], strict=True)
            ]
            for kind in ("wall", "processor")
        }
        yield (
            f"| {cell} | {WAYS[way][1]} | {_middle(wall)} | {low * 1e3:.2f} to {high * 1e3:.2f} "
            f"| {_middle([s for t in times for s in t.processor])} "
            f"| {statistics.median(ratios['wall']):.3f} | {statistics.median(ratios['processor']):.3f} "
            f"| {min(ratios['processor']):.3f} to {max(ratios['processor']):.3f} |"
        )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _middle(seconds: list[float]) -> str:
    return f"{statistics.median(seconds) * 1e3:.2f}"


def main() -> None:
    """Measure on this machine."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="rounds of each way (default 10)")
    parser.add_argument(
        "--batches", nargs="+", default=["8x4", "8x1"], metavar="AxB",
        help="micro-batch x accumulation of each cell (default: the app's own, and the smallest step of the matrix)",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=30, metavar="N", help="counted steps of a round (default 30)")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS, help="what to compare with bare")
    parser.add_argument("--write", action="store_true", help="put the table into docs/cost.md")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    ways = list(dict.fromkeys(["bare", *options.ways]))
    cells = [Cell("fp32", *map(int, batch.split("x"))) for batch in options.batches]
    found = {str(cell): measured(ways, cell, options.rounds, options.steps) for cell in cells}
    made = table(found, options.steps)
    print(made)
    if options.write:
        put(PAGE, "table", made)


if __name__ == "__main__":
    main()
