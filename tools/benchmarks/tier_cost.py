"""Measures what a whole cell takes in each tier, reference runs included; writes a table of docs/cost.md.

    python -m tools.benchmarks.tier_cost --write   (ten minutes on one core)

A cell of the app's training on its embedded model, in one process and one thread: by the Trainer alone, and as each
tier looks at it, one after the other in an order that is drawn for each round. What is loaded and made once in a
process has been before.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers

from pytest_sftguard.engine.runner import run
from pytest_sftguard.engine.surroundings.isolation import isolated
from pytest_sftguard.matrix import Cell, RunConfig
from pytest_sftguard.tiers import TIERS, NoReferenceError, asked, reference_config
from tools.benchmarks.guard_cost import TARGET, cell_named
from tools.benchmarks.pages import publish, where
from tools.benchmarks.turns import alone

PAGE = Path(__file__).resolve().parents[2] / "docs" / "cost.md"
CELLS = [Cell("fp32", 8, 4), Cell("bf16-mixed", 8, 1)]
BARE = "the Trainer alone"


def configs(config: RunConfig, tier: str) -> Iterator[RunConfig]:
    """The run of a cell in `tier`, and its reference runs where the session has no other cell."""
    looks, references = asked(tier)
    yield dataclasses.replace(config, looks=looks)
    for reference in references:
        try:
            yield reference_config(config, reference)
        except NoReferenceError:
            continue


def seconds(config: RunConfig, tier: str) -> float:
    """Wall seconds of the cell in `tier`."""
    began = time.perf_counter()
    if tier == BARE:
        with isolated(), tempfile.TemporaryDirectory() as folder:
            alone(config, Path(folder))
        return time.perf_counter() - began
    for each in configs(config, tier):
        record = run(each)
        if record.error is not None or record.not_run is not None:
            raise SystemExit(f"{each.cell} {each.variant} ended: {record.error or record.not_run}")
    return time.perf_counter() - began


def rows(found: dict[str, dict[str, list[float]]]) -> Iterator[str]:
    """Lines of the table, by cell and tier."""
    for cell, by_tier in found.items():
        bare = statistics.median(by_tier[BARE])
        for tier, taken in by_tier.items():
            middle = statistics.median(taken)
            name = tier if tier == BARE else f"tier `{tier}`"
            yield (
                f"| {cell} | {name} | {middle:.2f} | {min(taken):.2f} to {max(taken):.2f} | {middle - bare:.2f} "
                f"| {middle / bare:.2f} |"
            )


def main() -> None:
    """Measure on this machine."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="rounds (default 3)")
    parser.add_argument("--steps", type=int, default=30, metavar="N", help="optimizer steps of a cell (default 30)")
    parser.add_argument("--cells", nargs="+", default=CELLS, type=cell_named, metavar="CELL", help="precision-bAxB")
    parser.add_argument("--write", action="store_true", help="put the table into docs/cost.md")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    draw, tiers = random.Random(0), [BARE, *TIERS]
    found: dict[str, dict[str, list[float]]] = {str(c): {t: [] for t in tiers} for c in options.cells}
    for cell in options.cells:
        config = RunConfig(cell=cell, target=TARGET, device="cpu", steps=options.steps)
        # whatever is loaded and made once
        for tier in tiers:
            seconds(dataclasses.replace(config, steps=2), tier)
        for number in range(options.rounds):
            for tier in draw.sample(tiers, len(tiers)):
                found[str(cell)][tier].append(seconds(config, tier))
            wording = ", ".join(f"{t} {taken[-1]:.1f} s" for t, taken in found[str(cell)].items())
            print(f"{cell}, round {number + 1} of {options.rounds}: {wording}", flush=True)
    lines = [
        "| cell | | wall (s) | from, to | beyond the training (s) | times the training |",
        "|---|---|---|---|---|---|",
        *rows(found),
        "",
        f"{where()}; {options.steps} optimizer steps a cell, medians of {options.rounds} rounds.",
    ]
    made = "\n".join(lines)
    publish(PAGE, "tiers", made, write=options.write)


if __name__ == "__main__":
    main()
