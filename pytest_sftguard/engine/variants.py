"""Reference runs: what each variant does differently in training."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TrainerCallback

from pytest_sftguard.engine.tensors.reductions import digests
from pytest_sftguard.matrix import RunConfig
from pytest_sftguard.records import Names, StepRecord

if TYPE_CHECKING:
    from transformers import Trainer


class InapplicableError(Exception):
    """A training that can have no such reference; the message says why."""


def prepared(trainer: Trainer, config: RunConfig) -> Trainer:
    """Return `trainer` with the changes that the variant of `config` makes before the training."""
    if config.stop_after is not None and config.stop_after < config.steps:
        trainer.add_callback(_StopAfter(config.stop_after))
    if config.variant == "one_batch":
        _repeat_one_batch(trainer)
    if config.variant == "resumed":
        if trainer.args.save_only_model:
            raise InapplicableError("with save_only_model, its checkpoints cannot be resumed from")
        trainer.add_callback(_StopAfter(config.steps // 2, save=True))
    return trainer


def checkpoint_of(trainer: Trainer) -> str:
    """Return the folder of the checkpoint that an interrupted training left. Raises FileNotFoundError without one."""
    folder = Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}"
    if not folder.is_dir():
        raise FileNotFoundError(f"the training left no checkpoint at step {trainer.state.global_step}")
    return str(folder)


def resume(trainer: Trainer, checkpoint: str, begin: Callable[[], None]) -> None:
    """Resume the training from `checkpoint`; calls `begin` once it has been loaded."""
    trainer.add_callback(_AtBeginning(begin))
    trainer.train(resume_from_checkpoint=checkpoint)


def not_restored(interrupted: Trainer, resumed: Trainer) -> Names | None:
    """Trainable tensors that are not what they were when the checkpoint was saved; None where that was not seen."""
    saved = [c.saved for c in interrupted.callback_handler.callbacks if isinstance(c, _StopAfter)]
    if not saved or not saved[0]:
        return None
    now = _digests(resumed.model)
    return Names.of(n for n, digest in saved[0].items() if now.get(n) != digest)


def _digests(model: nn.Module) -> dict[str, str]:
    return digests((n, p) for n, p in model.named_parameters() if p.requires_grad)


def joined(first: tuple[StepRecord, ...], second: tuple[StepRecord, ...]) -> tuple[StepRecord, ...]:
    """Return the steps of both parts of an interrupted training, numbered from 1."""
    return (*first, *(dataclasses.replace(s, step=len(first) + s.step) for s in second))


# transformers types its callbacks as Any
class _StopAfter(TrainerCallback):  # type: ignore[misc]
    """Ends the training after a number of optimizer steps; the schedule stays that of the whole run."""

    def __init__(self, steps: int, save: bool = False) -> None:
        self.steps, self.save = steps, save
        self.saved: dict[str, str] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop once enough steps are done."""
        if state.global_step >= self.steps:
            control.should_training_stop = True
            control.should_save = control.should_save or self.save

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note what a resumed training has to begin with: the training may end with other weights, such as the best."""
        if self.save and state.global_step >= self.steps:
            self.saved = _digests(kwargs["model"])


# transformers types its callbacks as Any
class _AtBeginning(TrainerCallback):  # type: ignore[misc]
    """Calls a function when everything has been loaded and the first step comes next."""

    def __init__(self, act: Callable[[], None]) -> None:
        self.act = act

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The training begins."""
        self.act()


def _repeat_one_batch(trainer: Trainer) -> None:
    """Train on one micro-batch over and over: the one of the first step with the most labels."""
    original = trainer.get_batch_samples
    kept: list[Any] = []

    def one_batch(*args: Any, **kwargs: Any) -> Any:
        batches, _ = original(*args, **kwargs)
        if batches and not kept:
            kept.append(copy.deepcopy(max(batches, key=_labels)))
        # a loss may take its labels out of its batch
        copies = [copy.deepcopy(kept[0]) for _ in batches]
        return copies, trainer._get_num_items_in_batch(copies, trainer.args.device)

    trainer.get_batch_samples = one_batch


def _labels(batch: Any) -> int:
    labels = batch.get("labels") if hasattr(batch, "get") else None
    return int((labels != -100).sum()) if isinstance(labels, torch.Tensor) else 0
