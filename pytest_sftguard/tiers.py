"""Tiers: what a cell gets beyond its own training, as looks of the engine and as reference runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from pytest_sftguard.matrix import Cell, RunConfig
from pytest_sftguard.precision import mode_named


@dataclass(frozen=True)
class Tier:
    """One row of the table."""

    looks: tuple[str, ...]
    """Looks at the run itself, each a file in `engine/looks`."""
    references: tuple[str, ...] = ()
    """Other runs that it is compared with, trained for the purpose where no cell of the session will do."""


_QUICK = (
    "wiring",
    "supervision",
    "prompts",
    "batches",
    "arrival",
    "randomness",
    "base_during",
    "reach",
    "kept_checkpoint",
    "checkpoints",
    "following",
)
_STANDARD = (
    *_QUICK,
    "large_checkpoints",
    "replay",
    "context",
    "paths",
    "first_batch",
    "evaluation",
    "base_answers",
    "decoding",
    "answering",
    "continuing",
    "merging",
)

TIERS: dict[str, Tier] = {
    # the training, and what model, data, file and answers show, with one forward pass over the answers
    "quick": Tier(_QUICK),
    # a few more forward passes and short runs
    "standard": Tier(_STANDARD, ("fp32", "batch_split")),
    # whole trainings: again, interrupted and resumed, on one batch, in two processes
    "thorough": Tier(_STANDARD, ("fp32", "batch_split", "rerun", "resumed", "one_batch", "replicas")),
}
"""Every tier by its name, the cheapest first; each holds all of the one before it."""

LOOKS = TIERS["thorough"].looks
"""Every look of the engine."""

REFERENCES = TIERS["thorough"].references
"""Every reference run."""


def asked(tier: str, more: Iterable[str] = ()) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the looks and of the reference runs of `tier`, and of those named in `more`, in the tables' order."""
    names = set(more)
    looks = tuple(n for n in LOOKS if n in TIERS[tier].looks or n in names)
    return looks, tuple(r for r in REFERENCES if r in TIERS[tier].references or r in names)


class NoReferenceError(Exception):
    """A cell can have no such reference; the message says why."""


def reference_config(config: RunConfig, name: str, session: Iterable[RunConfig] = ()) -> RunConfig:
    """The reference run `name`, one of REFERENCES, that `config` is compared with.

    It is a run of `session` where one will do, so that nothing is trained twice; else a run of its own, without looks
    and questions. Raises NoReferenceError where the cell can have none.
    """
    return _MAKERS[name](config, session)


def _fp32(config: RunConfig, session: Iterable[RunConfig]) -> RunConfig:
    if config.cell.precision == "fp32":
        raise NoReferenceError("the cell is itself the float32 one")
    if mode_named(config.cell.precision).quantisation:
        raise NoReferenceError("no float32 cell has the rounded weights of a quantised base")
    wanted = dataclasses.replace(config.cell, precision="fp32")
    same = [c for c in _siblings(config, session) if c.cell == wanted]
    return same[0] if same else _alone(config, "fp32", cell=wanted)


def _batch_split(config: RunConfig, session: Iterable[RunConfig]) -> RunConfig:
    """The same rows in each step in other micro-batches; the session's run with the largest ones, if it has any."""
    own = config.cell
    if own.effective_batch == 1:
        raise NoReferenceError("a batch of one row cannot be split")
    others = [c for c in _siblings(config, session) if c.cell.precision == own.precision]
    others = [c for c in others if c.cell.effective_batch == own.effective_batch]
    if others:
        return max(others, key=lambda c: c.cell.per_device_train_batch_size)
    per_device, accumulation = own.per_device_train_batch_size, own.gradient_accumulation_steps
    divisor = next((d for d in range(2, per_device + 1) if per_device % d == 0), None)
    # smaller micro-batches need no more memory
    smaller = (per_device // divisor, accumulation * divisor) if divisor else (accumulation, 1)
    return _alone(config, "batch_split", cell=Cell(own.precision, *smaller), stop_after=min(2, config.steps))


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
"""Least number of steps on one batch: enough for a loss that can fall to fall visibly."""

_MAKERS: dict[str, Callable[[RunConfig, Iterable[RunConfig]], RunConfig]] = {
    "fp32": _fp32,
    "batch_split": _batch_split,
    "rerun": _rerun,
    "resumed": _resumed,
    "one_batch": _one_batch,
    "replicas": _replicas,
}


def _siblings(config: RunConfig, session: Iterable[RunConfig]) -> list[RunConfig]:
    """The runs of `session` that differ from `config` in their cell alone."""
    return [c for c in session if c != config and dataclasses.replace(c, cell=config.cell) == config]


def _alone(config: RunConfig, name: str, **changes: Any) -> RunConfig:
    return dataclasses.replace(config, variant=name, looks=(), questions=0, **changes)
