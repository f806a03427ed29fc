"""Measures what watching costs in each step, beside other ways to find a NaN, and writes the table of docs/cost.md.

    python -m tools.benchmarks.guard_cost          (ten minutes on one core)
    python -m tools.benchmarks.guard_cost --write  (and puts the table into docs/cost.md)
    python -m tools.benchmarks.guard_cost --device cuda

Every way trains the app's embedded model, in one process, and computes in one thread. The trainings take turns after
every step, in an order that is drawn for each lap, so that whatever else the machine does meets all of them; each round
makes them all anew, since where its tensors come to lie in memory makes a training a percent faster or slower. A step
is the time from the end of one to the end of the next, the data loader's included. The processor's time is beside the
wall's: other programs slow the wall down, and the processor less.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import TrainerCallback
from transformers.debug_utils import DebugUnderflowOverflow

from pytest_sftguard.engine.adapter.foundation import Loads
from pytest_sftguard.engine.building.targets import resolve
from pytest_sftguard.engine.looks import Looks
from pytest_sftguard.engine.recording.recorder import Recorder
from pytest_sftguard.engine.recording.watching import Watch
from pytest_sftguard.engine.stages import Asked, Built, Started
from pytest_sftguard.engine.surroundings.isolation import isolated
from pytest_sftguard.matrix import Cell, RunConfig
from pytest_sftguard.precision import mode_named
from pytest_sftguard.tiers import TIERS
from tools.benchmarks.pages import publish, where
from tools.benchmarks.turns import Times, Turns

PAGE = Path(__file__).resolve().parents[2] / "docs" / "cost.md"
TARGET = "homework.sft:build_trainer"
CELLS = [Cell("fp32", 8, 4), Cell("fp32", 2, 4), Cell("fp32", 8, 1), Cell("bf16-mixed", 2, 4), Cell("bf16-mixed", 8, 1)]
"""The app's own training on a CPU, and the cells of the matrix where nothing is asked."""
WARM_UP = 3
"""Steps at the start of a round that are not counted: the first of them makes the optimizer's states."""


@contextlib.contextmanager
def bare(built: Built) -> Iterator[None]:
    """Nothing."""
    yield


@contextlib.contextmanager
def quick(built: Built) -> Iterator[None]:
    """The guard as tier `quick` watches a cell."""
    with _guarded(built, TIERS["quick"].looks):
        yield


@contextlib.contextmanager
def replay(built: Built) -> Iterator[None]:
    """The same, and every step replayed in float32."""
    with _guarded(built, (*TIERS["quick"].looks, "replay")):
        yield


@contextlib.contextmanager
def anomaly(built: Built) -> Iterator[None]:
    """What torch offers, switched on while it is its turn: every backward function's results are looked at."""
    yield


@contextlib.contextmanager
def underflow(built: Built) -> Iterator[None]:
    """What transformers offers: the inputs, weights and results of every module are looked at."""
    with contextlib.redirect_stdout(None):
        DebugUnderflowOverflow(built.trainer.model)
    yield


@contextlib.contextmanager
def telemetry(built: Built) -> Iterator[None]:
    """What pytest-torch's `run_training` records of each step of an optimizer, here of the Trainer's."""
    from pytest_torch.training_loop import TrainingSetup, _Recorder

    with contextlib.ExitStack() as stack:

        class Telemetry(TrainerCallback):
            def on_train_begin(self, *args: Any, optimizer: Any = None, **kwargs: Any) -> None:
                """The Trainer has made its optimizer."""
                self.recorder = stack.enter_context(_Recorder(TrainingSetup(built.trainer.model, optimizer)))
                self.recorder.begin(0)
                self.records: list[Any] = []

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                """As `run_training` does after each step; no loss comes to a callback."""
                self.records.append(self.recorder.end(torch.zeros(())))
                self.recorder.begin(state.global_step)

        watching = Telemetry()
        built.trainer.add_callback(watching)
        yield
        assert all(r.grad_norm and r.update_norm for r in watching.records)
        assert len(watching.records) == built.trainer.args.max_steps


@contextlib.contextmanager
def _guarded(built: Built, names: tuple[str, ...]) -> Iterator[None]:
    looks = Looks(names)
    looks.prepare(built)
    recorder = Recorder(built.trainer.model)
    watch = Watch(built.trainer, recorder)
    looks.attach(built.then(Started, recorder=recorder, watch=watch))
    yield
    watch.detach()
    assert len(recorder.steps) == built.trainer.args.max_steps


WAYS: dict[str, tuple[Callable[[Built], Any], str]] = {
    "bare": (bare, "the Trainer alone"),
    "quick": (quick, "guard, tier `quick`"),
    "replay": (replay, "guard, tier `quick` and look `replay`"),
    "anomaly": (anomaly, "`torch.autograd.set_detect_anomaly(True)`"),
    "underflow": (underflow, "`transformers` `DebugUnderflowOverflow`"),
    "telemetry": (telemetry, "`pytest-torch`'s telemetry of each step"),
}
INSTALLED = [method for method in WAYS if method != "telemetry" or importlib.util.find_spec("pytest_torch")]
"""Those that can be measured here: pytest-torch is no requirement of anything else (`pip install pytest-torch`)."""


WITHIN: dict[str, Callable[[], Any]] = {"anomaly": lambda: torch.autograd.set_detect_anomaly(True)}
"""What is switched on for the whole process, and so only while it is that training's turn."""


SETTLE: dict[str, Callable[[], None]] = {"cpu": lambda: None, "cuda": torch.cuda.synchronize}
"""Waits until a device has done what it was given, so that nothing of a step is left to the next training's turn."""


def one_round(methods: list[str], cell: Cell, steps: int, device: str) -> dict[str, Times]:
    """Train once in each of the `methods`, in turns."""
    config = RunConfig(cell=cell, target=TARGET, device=device, steps=steps + WARM_UP)
    mode, target = mode_named(cell.precision), resolve(TARGET)
    with isolated(), tempfile.TemporaryDirectory() as folder:

        def training(method: str) -> Callable[[TrainerCallback], None]:
            def train(turn: TrainerCallback) -> None:
                asked = Asked(config=config, mode=mode, device_type=device, target=target, folder=Path(folder) / method)
                trainer = asked.build("training")
                trainer.log = lambda *_, **__: None
                with WAYS[method][0](asked.then(Built, trainer=trainer, loads=Loads())):
                    trainer.add_callback(turn)
                    trainer.train()

            return train

        turns = Turns(methods, warm_up=WARM_UP, within=WITHIN, settle=SETTLE[device])
        return turns.run({method: training(method) for method in methods})


def measured(methods: list[str], cell: Cell, rounds: int, steps: int, device: str) -> dict[str, list[Times]]:
    """Every way, round by round."""
    # whatever is loaded and made once
    one_round(methods, cell, 1, device)
    found: dict[str, list[Times]] = {method: [] for method in methods}
    for i in range(rounds):
        for method, times in one_round(methods, cell, steps, device).items():
            found[method].append(times)
        print(
            f"{cell}, round {i + 1} of {rounds}: " + ", ".join(f"{w} {_middle(t[-1].wall)}" for w, t in found.items())
        )
        sys.stdout.flush()
    return found


def table(found: dict[str, dict[str, list[Times]]], steps: int, device: str) -> str:
    """Markdown, with a line on where and how; `found` by cell and way."""
    lines = [
        "| cell | | step, wall (ms) | quartiles | processor (ms) | wall / bare | processor / bare | single rounds |",
        "|---|---|---|---|---|---|---|---|",
        *(row for cell, by_way in found.items() for row in _rows(cell, by_way)),
    ]
    rounds = len(next(iter(found.values()))["bare"])
    lines += ["", _over_cells(found)]
    lines += [
        "",
        f"{where(device)}, load {os.getloadavg()[0]:.1f} at the end."
        f" {rounds} rounds of {steps} steps for each, in turns after every step; medians and quartiles of all steps,"
        " and the smallest and the largest ratio of a round's medians, of the processor.",
    ]
    return "\n".join(lines)


def _rows(cell: str, found: dict[str, list[Times]]) -> Iterator[str]:
    for method, times in found.items():
        wall = [s for t in times for s in t.wall]
        low, _, high = statistics.quantiles(wall, n=4)
        rounds = [ratio([t], [b], "processor") for t, b in zip(times, found["bare"], strict=True)]
        yield (
            f"| {cell} | {WAYS[method][1]} | {_middle(wall)} | {low * 1e3:.2f} to {high * 1e3:.2f} "
            f"| {_middle([s for t in times for s in t.processor])} "
            f"| {ratio(times, found['bare']):.3f} | {ratio(times, found['bare'], 'processor'):.3f} "
            f"| {min(rounds):.3f} to {max(rounds):.3f} |"
        )


def ratio(of: list[Times], to: list[Times], clock: str = "wall") -> float:
    """The median step of some rounds in medians of others."""
    middle, other = (statistics.median(s for t in times for s in getattr(t, clock)) for times in (of, to))
    return middle / other


def _over_cells(found: dict[str, dict[str, list[Times]]]) -> str:
    wording = []
    for method in next(iter(found.values())):
        ratios = [ratio(by_way[method], by_way["bare"]) for by_way in found.values()]
        wording.append(f"{WAYS[method][1]}: {statistics.median(ratios):.3f}, at most {max(ratios):.3f}")
    return f"Wall / bare over the {len(found)} cells, in the median and in the worst: {'; '.join(wording[1:])}."


def _middle(seconds: list[float]) -> str:
    return f"{statistics.median(seconds) * 1e3:.2f}"


def cell_named(name: str) -> Cell:
    """The cell of an id such as `fp32-b8x4`."""
    precision, _, batch = name.rpartition("-b")
    rows, times = map(int, batch.split("x"))
    return Cell(mode_named(precision).name, rows, times)


def main() -> None:
    """Measure on this machine."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="rounds of each way (default 10)")
    parser.add_argument(
        "--cells",
        nargs="+",
        default=CELLS,
        type=cell_named,
        metavar="CELL",
        help="precision-bAxB: A rows, B times (default: the app's own, and the matrix as it is where nothing is asked)",
    )
    parser.add_argument("--steps", type=int, default=30, metavar="N", help="counted steps of a round (default 30)")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=INSTALLED,
        choices=WAYS,
        help=f"what to compare with bare (default: what is installed here: {', '.join(INSTALLED)})",
    )
    parser.add_argument("--device", default="cpu", choices=SETTLE, help="where the trainings run (default cpu)")
    parser.add_argument("--write", action="store_true", help="put the table into docs/cost.md")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    methods = list(dict.fromkeys(["bare", *options.methods]))
    found = {str(c): measured(methods, c, options.rounds, options.steps, options.device) for c in options.cells}
    made = table(found, options.steps, options.device)
    publish(PAGE, "table" if options.device == "cpu" else f"{options.device} table", made, write=options.write)


if __name__ == "__main__":
    main()
