"""Predicts and measures the peak memory of real trainings, and writes the table of docs/memory.md.

    python -m tools.benchmarks.memory_table          (about ten minutes on one core)
    python -m tools.benchmarks.memory_table --write  (and puts the table into docs/memory.md)

The measure knows nothing of the prediction. On the CPU it is every allocation and release that torch's CPU allocator
reports to torch's profiler during `trainer.train()`, added up over time; on a CUDA GPU, where there is one, it is
`torch.cuda.max_memory_allocated`. Only the weights, which are there before, are taken from their sizes on the CPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import os
import tempfile
import warnings
from pathlib import Path

import torch

from pytest_sftguard.engine.building.targets import resolve
from pytest_sftguard.engine.building.trainers import build
from pytest_sftguard.engine.machine.profiles import choose_device, device_profile
from pytest_sftguard.engine.memory.prediction import predict
from pytest_sftguard.engine.surroundings.isolation import isolated
from pytest_sftguard.matrix import Cell, RunConfig
from pytest_sftguard.precision import mode_named
from pytest_sftguard.sizes import format_bytes
from tools.benchmarks.memory_targets import TOKENS
from tools.benchmarks.pages import put

PAGE = Path(__file__).resolve().parents[2] / "docs" / "memory.md"
STEPS = 3
MODELS = {
    "small": "tools.benchmarks.memory_targets:small",
    "smol": "tools.benchmarks.memory_targets:smol",
    "homework": "homework.sft:build_trainer",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One training."""

    model: str
    tokens: int
    precision: str
    batch: int
    accumulation: int = 1
    checkpointing: bool = False

    def config(self, device_type: str) -> RunConfig:
        """The run on a device of `device_type`."""
        arguments = {"gradient_checkpointing": True} if self.checkpointing else {}
        return RunConfig(
            cell=Cell(self.precision, self.batch, self.accumulation),
            target=MODELS[self.model],
            device=device_type,
            steps=STEPS,
            training_arguments=arguments,
        )


CASES = [
    *(
        Case("small", tokens, precision, batch, checkpointing=checkpointing)
        for tokens, batch in ((64, 8), (256, 4))
        for precision in ("fp32", "bf16-mixed", "fp16-mixed")
        for checkpointing in (False, True)
    ),
    Case("small", 128, "fp32", 2, 4),
    Case("small", 128, "bf16-mixed", 2, 4),
    Case("small", 128, "bf16-true", 8),
    *(
        Case("smol", tokens, precision, batch, checkpointing=checkpointing)
        for tokens, batch in ((64, 4), (256, 2))
        for precision in ("fp32", "bf16-mixed")
        for checkpointing in (False, True)
    ),
    Case("smol", 128, "bf16-true", 4),
    Case("smol", 32, "fp32", 1, 2),
    Case("homework", 34, "fp32", 8, 4),
    Case("homework", 34, "bf16-mixed", 32),
    Case("homework", 34, "fp16-mixed", 8),
]


def measured(config: RunConfig, device_type: str) -> int:
    """Peak bytes that the allocator really gave out while the cell's Trainer trained."""
    with isolated(), tempfile.TemporaryDirectory() as folder:
        trainer = build(resolve(config.target), config, mode_named(config.cell.precision), device_type, Path(folder))
        trainer.log = lambda *_, **__: None
        if device_type == "cuda":
            # the Trainer before this one, which is held in circles
            gc.collect()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            trainer.train()
            return torch.cuda.max_memory_allocated()
        weights = [t.untyped_storage() for t in (*trainer.model.parameters(), *trainer.model.buffers())]
        before = sum({s.data_ptr(): s.nbytes() for s in weights}.values())
        return before + allocator_peak(trainer.train)


def allocator_peak(work) -> int:
    """Peak of what the CPU allocator gave out during `work()`, beyond what was there before."""
    with torch.autograd.profiler.profile(profile_memory=True, use_kineto=True) as profile:
        work()
    events = [(e.start_ns(), e.nbytes()) for e in profile.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for _, size in sorted(events, key=lambda event: event[0]):
        live += size
        peak = max(peak, live)
    return peak


def table(device_type: str) -> str:
    """Every case predicted and measured, as Markdown with a summary."""
    device = device_profile(device_type)
    lines = [
        "| model | tokens | precision | batch | checkpointing | predicted | measured | error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    errors = []
    for case in CASES:
        os.environ[TOKENS] = str(case.tokens)
        config = case.config(device_type)
        predicted = predict(config, device).peak_bytes
        real = measured(config, device_type)
        errors.append(predicted / real - 1)
        lines.append(
            f"| {case.model} | {case.tokens} | {case.precision} | {case.batch}x{case.accumulation} "
            f"| {'on' if case.checkpointing else 'off'} | {format_bytes(predicted)} | {format_bytes(real)} "
            f"| {errors[-1]:+.2%} |"
        )
        print(lines[-1], flush=True)
    mean = sum(map(abs, errors)) / len(errors)
    summary = (
        f"{device.name}, torch {torch.__version__}: {len(errors)} trainings, mean absolute error {mean:.2%}, "
        f"worst under-prediction {max(0, -min(errors)):.2%}, worst over-prediction {max(0, *errors):.2%}."
    )
    print(summary)
    return "\n".join([*lines, "", summary])


def main() -> None:
    """Make the table of this machine."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="put the table into docs/memory.md")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    device_type, _ = choose_device("auto")
    made = table(device_type)
    if options.write:
        put(PAGE, f"{device_type} table", made)


if __name__ == "__main__":
    main()
