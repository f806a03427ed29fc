"""Targets whose checkpoints or answers are not what they should be, and sound ones that look like them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, Trainer

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


def _scores(change: Callable[[torch.Tensor], torch.Tensor], arguments: dict[str, Any]) -> Trainer:
    """A Trainer whose model generates with changed scores: each model of the target does, the reloaded one too."""

    class Changed(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return change(scores)

    trainer = sums(**arguments)
    plain = trainer.model.get_base_model()
    original = plain.generate

    def generate(*args: Any, **kwargs: Any) -> Any:
        return original(*args, logits_processor=LogitsProcessorList([Changed()]), **kwargs)

    plain.generate = generate
    return trainer


def scores_negated_in_part(**arguments: Any) -> Trainer:
    """Generation negates every second score."""
    signs = torch.tensor([1.0, -1.0]).repeat(32)[:64]
    return _scores(lambda scores: scores * signs[: scores.shape[-1]], arguments)


def scores_rounded(**arguments: Any) -> Trainer:
    """Generation rounds scores to multiples of 8."""
    return _scores(lambda scores: 8 * (scores / 8).round(), arguments)


def answers_of_the_row_above(**arguments: Any) -> Trainer:
    """Generation gives each row the scores of its neighbour."""
    return _scores(lambda scores: scores.roll(1, 0), arguments)


def cache_shifted(**arguments: Any) -> Trainer:
    """Generation counts its places from one too many, once there is a cache."""
    trainer = sums(**arguments)
    plain = trainer.model.get_base_model()
    original = plain.forward

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        ids = kwargs.get("input_ids")
        if ids is not None and ids.shape[1] == 1 and kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = kwargs["position_ids"] + 5
        return original(*args, **kwargs)

    plain.forward = forward
    return trainer


def scores_scaled(**arguments: Any) -> Trainer:
    """Generation scales scores, which leaves their order as it is."""
    return _scores(lambda scores: 3.0 * scores, arguments)


def penalised(**arguments: Any) -> Trainer:
    """The model's generation_config penalises and forbids tokens."""
    trainer = sums(**arguments)
    settings = trainer.model.get_base_model().generation_config
    settings.repetition_penalty, settings.no_repeat_ngram_size = 1.3, 2
    settings.min_new_tokens, settings.suppress_tokens, settings.begin_suppress_tokens = 3, [14, 15], [20]
    settings.bad_words_ids, settings.sequence_bias = [[21], [22, 23]], [[[24], -5.0]]
    return trainer


def with_beams(**arguments: Any) -> Trainer:
    """The model's generation_config searches with beams."""
    trainer = sums(**arguments)
    trainer.model.get_base_model().generation_config.num_beams = 2
    return trainer
