"""The precision x batch matrix: its cells, their ids, and how options expand into them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pytest_sftguard.precision import mode_named

_BATCH = re.compile(r"([0-9]+)(?:x([0-9]+))?", re.ASCII)


@dataclass(frozen=True)
class Batch:
    """A per-device batch as asked for; the accumulation is open until the matrix is expanded."""

    per_device: int
    """Rows in one micro-batch."""
    accumulation: int | None = None
    """Micro-batches per optimizer step, or None: as many as the effective batch needs."""


@dataclass(frozen=True)
class Cell:
    """A point of the matrix; `str(cell)` is the id of its test, equal on every machine."""

    precision: str
    """Name of a precision mode."""
    per_device_train_batch_size: int
    """Rows in one micro-batch."""
    gradient_accumulation_steps: int
    """Micro-batches per optimizer step."""

    def __str__(self) -> str:
        return f"{self.precision}-b{self.per_device_train_batch_size}x{self.gradient_accumulation_steps}"

    @property
    def effective_batch(self) -> int:
        """Rows per optimizer step on one device."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps


def parse_batch(value: object) -> Batch:
    """Read `8`, `"8"` or `"2x4"` (per-device batch x accumulation).

    Raises ValueError for anything else, zero and booleans included.
    """
    match = _BATCH.fullmatch(str(value).strip()) if not isinstance(value, bool) else None
    if match is None:
        raise ValueError(
            f"batch {value!r} is not a batch: give a whole number such as 8, or 2x4 for 4 micro-batches of 2"
        )
    per_device, accumulation = int(match[1]), int(match[2]) if match[2] else None
    if per_device < 1 or accumulation == 0:
        raise ValueError(f"batch {value!r} is not a batch: it must be at least 1")
    return Batch(per_device, accumulation)


def expand(precisions: Sequence[str], batches: Iterable[Batch], effective_batch: int | None = None) -> list[Cell]:
    """All cells of `precisions` x `batches`, in that order, without duplicates.

    All batches share one effective batch, so that cells differ in nothing but the cut: `effective_batch` where it is
    given, else the least common multiple of the per-device batches. A batch written with its own accumulation
    keeps it. Raises ValueError for an unknown precision, an empty axis, or a batch that does not divide the
    effective one.
    """
    batches = list(batches)
    if not precisions or not batches:
        raise ValueError("the matrix is empty: name at least one precision and one batch")
    if effective_batch is None:
        effective_batch = math.lcm(*(b.per_device for b in batches))
    cells = []
    for precision in precisions:
        mode_named(precision)
        for batch in batches:
            accumulation = batch.accumulation
            if accumulation is None:
                accumulation, rest = divmod(effective_batch, batch.per_device)
                if rest:
                    raise ValueError(
                        f"batch {batch.per_device} does not divide the effective batch {effective_batch}: "
                        f"choose another, or write the accumulation out, as in {batch.per_device}x2"
                    )
            cells.append(Cell(precision, batch.per_device, accumulation))
    return list(dict.fromkeys(cells))


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What the engine is asked to run: a cell, and how."""

    cell: Cell
    """Point of the matrix."""
    target: str
    """Dotted path of the function that builds the Trainer."""
    steps: int = 8
    """Optimizer steps."""
    model: str | None = None
    """Model that the target is asked to load; None: its own default."""
    seed: int = 0
    """Seed of weights, data order and dropout."""
    device: str = "auto"
    """`auto` (the first CUDA device, or else the CPU), `cpu`, `cuda`, `mps` or `xpu`."""
    questions: int = 8
    """Questions that the reloaded adapter is asked, where the target has any."""
    training_arguments: dict[str, Any] = field(default_factory=dict)
    """Further `TrainingArguments` by name; they win over the guard's own."""
    looks: tuple[str, ...] = ()
    """Extra looks of the engine, by name; see `tiers.LOOKS`."""
    variant: str = ""
    """Empty for a cell's own run, else the kind of reference that this run is for it; see `tiers.REFERENCES`."""
    stop_after: int | None = None
    """Optimizer steps after which the run ends early; None: it goes to its end."""
    fit_margin: float | str = "off"
    """Share of the free memory that a cell must leave, or else it is not trained; `auto`: on CUDA; `off`: nowhere."""
