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
    """A requested per-device batch; its accumulation may be open until the matrix is expanded."""

    per_device: int
    """Rows in one micro-batch."""
    accumulation: int | None = None
    """Micro-batches per optimizer step; None for as many as the effective batch needs."""


@dataclass(frozen=True)
class Cell:
    """A point of the matrix. `str(cell)` is the id of its test, the same on every machine."""

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
    """Parse `8`, `"8"` or `"2x4"` (per-device batch x accumulation).

    Raises ValueError for anything else, including zero and booleans.
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
    """Return all cells of `precisions` x `batches`, in that order, without duplicates.

    All batches share one effective batch, so that cells of one precision differ in the batch split only. It is
    `effective_batch` if given, and otherwise the least common multiple of the per-device batches. A batch with its own
    accumulation keeps it. Raises ValueError for an unknown precision, an empty axis, or a batch that does not divide
    the effective one.
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
    """A request to the engine: a cell, and how to run it."""

    cell: Cell
    """Point of the matrix."""
    target: str
    """Dotted path of the function that builds the Trainer."""
    steps: int = 8
    """Number of optimizer steps."""
    model: str | None = None
    """Model that the target is asked to load; None for its own default."""
    seed: int = 0
    """Seed of weights, data order and dropout."""
    device: str = "auto"
    """`auto` (the first CUDA device, or else the CPU), `cpu`, `cuda`, `mps` or `xpu`."""
    questions: int = 8
    """Number of questions for the reloaded adapter, if the target has any."""
    training_arguments: dict[str, Any] = field(default_factory=dict)
    """Further `TrainingArguments` by name; they override the guard's own."""
    looks: tuple[str, ...] = ()
    """Names of the engine's extra looks; see `tiers.LOOKS`."""
    variant: str = ""
    """Type of reference that this run is for its cell, of `tiers.REFERENCES`; empty for the cell's own run."""
    stop_after: int | None = None
    """Number of optimizer steps after which the run ends early; None for no early end."""
    fit_margin: float | str = "off"
    """Share of the free memory that a cell must leave to be trained; `auto` requires it on CUDA only, `off` nowhere."""
