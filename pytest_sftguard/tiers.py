"""Tiers: how much a cell is looked at beyond its own training, in looks of the engine and in other runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from pytest_sftguard.matrix import Cell, RunConfig


@dataclass(frozen=True, kw_only=True)
class Tier:
    """One row of the table."""

    looks: tuple[str, ...]
    """Looks at the run itself, each a file in `engine/looks`."""
    references: tuple[str, ...]
    """Other runs that it is compared with, trained for the purpose where no cell of the session is one."""
    summary: str
    """What it is for, in one sentence."""


_QUICK = ("wiring", "supervision", "prompts")
_STANDARD = (*_QUICK, "replay", "context", "paths", "evaluation", "base_answers", "decoding", "merging")

TIERS: dict[str, Tier] = {
    "quick": Tier(
        looks=_QUICK,
        references=(),
        summary="the training itself, and what can be read off model, data and file without another forward pass;"
        " cells of one session are references for each other",
    ),
    "standard": Tier(
        looks=_STANDARD,
        references=("fp32", "batch_split"),
        summary="beside that, a few forward passes and short runs: padding, packing, kernels, merging, decoding, the"
        " float32 sibling, another cut of the batch",
    ),
    "thorough": Tier(
        looks=_STANDARD,
        references=("fp32", "batch_split", "rerun", "resumed", "one_batch", "replicas"),
        summary="beside that, whole trainings: again, interrupted and resumed, on one batch, in two processes",
    ),
}
"""Every tier by its name, from the cheapest."""

LOOKS = _STANDARD
"""Every look of the engine."""

REFERENCES = TIERS["thorough"].references
"""Every kind of reference run."""


def asked(tier: str, more: Iterable[str] = ()) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The looks and the kinds of reference runs of `tier` and of `more`, in the order of the tables."""
    names = set(more)
    looks = tuple(n for n in LOOKS if n in TIERS[tier].looks or n in names)
    return looks, tuple(r for r in REFERENCES if r in TIERS[tier].references or r in names)


class NoReferenceError(Exception):
    """There is no such reference for a cell; the message says why."""


def reference_config(config: RunConfig, kind: str, session: Iterable[RunConfig] = ()) -> RunConfig:
    """The run that `config` is compared with as `kind`, one of REFERENCES.

    A run of `session` is taken where one will do, so that nothing is trained twice; else one of its own is made,
    without looks and answers. Raises NoReferenceError where the cell can have none.
    """
    return _MADE[kind](config, session)


def _fp32(config: RunConfig, session: Iterable[RunConfig]) -> RunConfig:
    if config.cell.precision == "fp32":
        raise NoReferenceError("the cell is the float32 one itself")
    wanted = dataclasses.replace(config.cell, precision="fp32")
    same = [c for c in _siblings(config, session) if c.cell == wanted]
    return same[0] if same else _alone(config, "fp32", cell=wanted)


def _cut(config: RunConfig, session: Iterable[RunConfig]) -> RunConfig:
    """The same rows in each step, in other micro-batches; of those in the session the one with the largest."""
    own = config.cell
    if own.effective_batch == 1:
        raise NoReferenceError("a batch of one row cannot be cut")
    others = [c for c in _siblings(config, session) if c.cell.precision == own.precision]
    others = [c for c in others if c.cell.effective_batch == own.effective_batch]
    if others:
        return max(others, key=lambda c: c.cell.per_device_train_batch_size)
    per_device, accumulation = own.per_device_train_batch_size, own.gradient_accumulation_steps
    divisor = next((d for d in range(2, per_device + 1) if per_device % d == 0), None)
    cell = (
        Cell(own.precision, per_device // divisor, accumulation * divisor)
        if divisor  # smaller micro-batches need no more memory
        else Cell(own.precision, accumulation, 1)
    )
    return _alone(config, "batch_split", cell=cell, stop_after=min(2, config.steps))


def _rerun(config: RunConfig, session: Iterable[RunConfig]) -> RunConfig:
    return _alone(config, "rerun")


def _resumed(config: RunConfig, session: Iterable[RunConfig]) -> RunConfig:
    if config.steps < 2:
        raise NoReferenceError("a run of one step cannot be interrupted")
    return _alone(config, "resumed")


def _one_batch(config: RunConfig, session: Iterable[RunConfig]) -> RunConfig:
    return _alone(config, "one_batch", steps=max(config.steps, ONE_BATCH_STEPS))


def _replicas(config: RunConfig, session: Iterable[RunConfig]) -> RunConfig:
    per_device = config.cell.per_device_train_batch_size
    if per_device % 2:
        raise NoReferenceError(f"a micro-batch of {per_device} rows cannot be halved")
    cell = dataclasses.replace(config.cell, per_device_train_batch_size=per_device // 2)
    return _alone(config, "replicas", cell=cell, device="cpu")


ONE_BATCH_STEPS = 20
"""Least number of steps on one batch, over which a loss that can fall does so visibly."""

_MADE: dict[str, Callable[[RunConfig, Iterable[RunConfig]], RunConfig]] = {
    "fp32": _fp32,
    "batch_split": _cut,
    "rerun": _rerun,
    "resumed": _resumed,
    "one_batch": _one_batch,
    "replicas": _replicas,
}


def _siblings(config: RunConfig, session: Iterable[RunConfig]) -> list[RunConfig]:
    """The runs of `session` that differ from `config` in their cell alone."""
    return [c for c in session if c != config and dataclasses.replace(c, cell=config.cell) == config]


def _alone(config: RunConfig, kind: str, **changes: Any) -> RunConfig:
    return dataclasses.replace(config, variant=kind, looks=(), questions=0, **changes)
