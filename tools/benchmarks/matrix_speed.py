"""Measures the matrix beside the same trainings in processes of their own; writes a table of docs/performance.md.

    python -m tools.benchmarks.matrix_speed --write   (twenty minutes on two cores)

Six cells of the app's training on its embedded model, two precisions times three cuts of 16 rows, under the guard's
`quick` tier: in one session of pytest, and in six sessions of one cell each. Beside them what the trainings would take
by themselves: their steps by the Trainer alone, in one fresh process as the session is one (in bfloat16 oneDNN makes a
kernel for each new number of tokens), and one start of a process that builds the Trainer and ends.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import transformers

from pytest_sftguard.engine.surroundings.isolation import isolated
from pytest_sftguard.matrix import Cell, RunConfig
from tools.benchmarks.pages import publish, where
from tools.benchmarks.processes import in_fresh_process
from tools.benchmarks.turns import alone

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "performance.md"
TARGET = "homework.sft:build_trainer"
CELLS = [Cell(precision, rows, 16 // rows) for precision in ("fp32", "bf16-mixed") for rows in (2, 8, 16)]
TEST = """
import pytest

@pytest.mark.gpu_stability
def test_training(sft_run):
    pass
"""
START = """
from homework.sft import build_trainer
build_trainer(use_cpu=True, per_device_train_batch_size=8, gradient_accumulation_steps=2, fp16=False, bf16=False)
"""


def session(folder: Path, steps: int, *more: str) -> float:
    """Wall seconds of one session of pytest."""
    (folder / "test_training.py").write_text(TEST)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        str(folder),
        "-c",
        os.devnull,
        "--rootdir",
        str(folder),
        "-m",
        "gpu_stability",
        "--sftguard-target",
        TARGET,
        "--sftguard-steps",
        str(steps),
        *more,
    ]
    began = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"the session failed:\n{done.stdout[-3000:]}{done.stderr[-2000:]}")
    return seconds


def axes(cells: list[Cell]) -> list[str]:
    """Options that ask for `cells`."""
    rows = dict.fromkeys(f"{c.per_device_train_batch_size}x{c.gradient_accumulation_steps}" for c in cells)
    return [
        "--sftguard-precision",
        " ".join(dict.fromkeys(c.precision for c in cells)),
        "--sftguard-batch",
        " ".join(rows),
    ]


def bare(steps: int) -> float:
    """Wall seconds of the steps of all cells, trained one after the other by the Trainer alone."""
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    with isolated(), tempfile.TemporaryDirectory() as name:
        configs = [RunConfig(cell=cell, target=TARGET, device="cpu", steps=steps) for cell in CELLS]
        return sum(sum(alone(config, Path(name)).wall) for config in configs)


def start() -> float:
    """Wall seconds of a process that gets as far as the first step of a training."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", START], cwd=ROOT, check=True, capture_output=True)
    return time.perf_counter() - began


def table(found: dict[int, dict[str, list[float]]], started: list[float]) -> str:
    """Markdown, with a line on where and how."""
    one = statistics.median(started)
    lines = [
        "| steps of a cell | one session | six sessions | six / one | bare steps of all cells | (one - start) / bare |",
        "|---|---|---|---|---|---|",
    ]
    for steps, seen in found.items():
        together, apart, alone = (statistics.median(seen[k]) for k in ("together", "apart", "bare"))
        lines.append(
            f"| {steps} | {together:.1f} s | {apart:.1f} s | {apart / together:.2f} | {alone:.1f} s "
            f"| {(together - one) / alone:.2f}: {together:.1f} s less {one:.1f} s, of {alone:.1f} s |"
        )
    rounds = len(next(iter(found.values()))["together"])
    lines += [
        "",
        f"Cells: {', '.join(map(str, CELLS))}. {where()}; medians of {rounds} rounds.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure on this machine."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=2, metavar="N", help="rounds (default 2)")
    parser.add_argument(
        "--steps",
        type=int,
        nargs="+",
        default=[4, 8, 30, 60],
        metavar="N",
        help="optimizer steps of a cell (default 4, 8, 30 and 60)",
    )
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    options = parser.parse_args()
    started: list[float] = []
    found: dict[int, dict[str, list[float]]] = {
        s: {k: [] for k in ("together", "apart", "bare")} for s in options.steps
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # whatever the disk must read first
        start()
        for number in range(options.rounds):
            started.append(start())
            for steps, seen in found.items():
                seen["together"].append(session(folder, steps, *axes(CELLS)))
                seen["apart"].append(sum(session(folder, steps, *axes([cell])) for cell in CELLS))
                seen["bare"].append(in_fresh_process(bare, steps))
                wording = {k: round(v[-1], 1) for k, v in seen.items()}
                print(f"round {number + 1}, {steps} steps: {wording}, start {started[-1]:.1f} s", flush=True)
    made = table(found, started)
    publish(PAGE, "matrix", made, write=options.write)


if __name__ == "__main__":
    main()
