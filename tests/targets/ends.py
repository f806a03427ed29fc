"""Targets whose checkpoints do not give back what was saved, and sound ones that look like them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from pytest_sftguard.engine.models.sums import build_trainer as sums
from pytest_sftguard.engine.models.sums import parse_answer, questions

__all__ = ["parse_answer", "questions"]

HELD: dict[str, Any] = {}
"""The last Trainer of `watched`, and what it saved."""


def _loading(change: Callable[[Any], None], arguments: dict[str, Any]) -> Trainer:
    """A Trainer that calls `change` with itself after loading."""
    trainer = sums(**arguments)
    original = trainer._load_optimizer_and_scheduler

    def load(checkpoint: str | None) -> None:
        original(checkpoint)
        if checkpoint is not None:
            change(trainer)

    trainer._load_optimizer_and_scheduler = load
    return trainer


def _moments(trainer: Any, key: str = "exp_avg") -> list[torch.Tensor]:
    return [state[key] for state in trainer.optimizer.optimizer.state.values()]


def moment_in_half_precision(**arguments: Any) -> Trainer:
    """Loading rounds one moment of one tensor to bfloat16."""

    def change(trainer: Any) -> None:
        first = _moments(trainer, "exp_avg_sq")[0]
        first.copy_(first.to(torch.bfloat16))

    return _loading(change, arguments)


def moments_exchanged(**arguments: Any) -> Trainer:
    """Loading gives two tensors of one shape each other's momentum."""

    def change(trainer: Any) -> None:
        moments = _moments(trainer)
        first = moments[0]
        other = next(m for m in moments[1:] if m.shape == first.shape)
        kept = first.clone()
        first.copy_(other)
        other.copy_(kept)

    return _loading(change, arguments)


def step_forgotten(**arguments: Any) -> Trainer:
    """Loading sets Adam's count of steps back, so that its bias correction begins anew."""
    return _loading(lambda trainer: [m.zero_() for m in _moments(trainer, "step")][:0], arguments)


def rate_overwritten(**arguments: Any) -> Trainer:
    """Loading sets the learning rate of the arguments again."""

    def change(trainer: Any) -> None:
        trainer.optimizer.param_groups[0]["lr"] = trainer.args.learning_rate

    return _loading(change, arguments)


def schedule_not_saved(**arguments: Any) -> Trainer:
    """Checkpoints have no scheduler.pt, so that transformers loads nothing at all."""
    trainer = sums(**arguments)
    original = trainer._save_optimizer_and_scheduler

    def save(folder: str) -> None:
        original(folder)
        (Path(folder) / "scheduler.pt").unlink()

    trainer._save_optimizer_and_scheduler = save
    return trainer


def loading_left_out(**arguments: Any) -> Trainer:
    """Loading does nothing."""
    trainer = sums(**arguments)
    trainer._load_optimizer_and_scheduler = lambda checkpoint: None
    return trainer


def loading_raises(**arguments: Any) -> Trainer:
    """Loading needs a file that only a whole checkpoint has."""

    def change(trainer: Any) -> None:
        raise FileNotFoundError("ema.pt")

    return _loading(change, arguments)


def watched(**arguments: Any) -> Trainer:
    """A sound Trainer that keeps what it saved."""
    trainer: Any = sums(**arguments)
    original = trainer._save_optimizer_and_scheduler

    def save(folder: str) -> None:
        original(folder)
        states = trainer.optimizer.state_dict(), trainer.lr_scheduler.state_dict()
        scaler = trainer.accelerator.scaler
        HELD.update(trainer=trainer, scaler=scaler and scaler.state_dict(), saved=copy.deepcopy(states))

    trainer._save_optimizer_and_scheduler = save
    return trainer
