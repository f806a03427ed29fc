"""Runs that are references for another: what each kind does differently in training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from pytest_sftguard.matrix import RunConfig

if TYPE_CHECKING:
    from transformers import Trainer


def prepared(trainer: Trainer, config: RunConfig) -> Trainer:
    """`trainer` with whatever the kind of `config` changes about it before the training."""
    if config.stop_after is not None and config.stop_after < config.steps:
        trainer.add_callback(_StopAfter(config.stop_after))
    return trainer


def train(trainer: Trainer, config: RunConfig) -> None:
    """Train as the kind of `config` does."""
    trainer.train()


class _StopAfter(TrainerCallback):  # type: ignore[misc] # transformers types its callbacks as Any
    """Ends the training after a number of optimizer steps; the schedule stays that of the whole run."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop once enough steps are done."""
        if state.global_step >= self.steps:
            control.should_training_stop = True
