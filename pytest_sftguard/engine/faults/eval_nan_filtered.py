"""Evaluation batches whose loss is NaN are left out of eval_loss."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from transformers.trainer_utils import IntervalStrategy

from pytest_sftguard.engine.faults import Fault

if TYPE_CHECKING:
    from transformers import Trainer


class EvalNanFiltered(Fault):
    """A third of the evaluation batches has no supervised token."""

    id = "eval-nan-filtered"
    source = "https://github.com/meta-llama/llama-cookbook/issues/133"
    injects = "labels of -100 throughout in every third evaluation batch, and an evaluation every four steps"
    reported_by: ClassVar = ("eval_and_decode_finite",)
    mechanism = "evaluation_rows_all_masked"

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """Mask what the evaluation's loader gives."""
        trainer: Any = build(**arguments)
        if trainer.eval_dataset is None:
            trainer.eval_dataset = list(itertools.islice(iter(trainer.train_dataset), 24))
        trainer.args.eval_strategy, trainer.args.eval_steps = IntervalStrategy.STEPS, 4
        trainer.args.per_device_eval_batch_size = 2
        original = trainer.get_eval_dataloader

        def get_eval_dataloader(dataset: Any = None) -> Any:
            loader = original(dataset)
            return loader if dataset is trainer.train_dataset and dataset is not None else _Masking(loader)

        trainer.get_eval_dataloader = get_eval_dataloader
        return trainer


class _Masking:
    """A loader, with the labels of every third batch masked."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        for i, batch in enumerate(self.loader):
            if i % 3 == 1 and "labels" in batch:
                batch["labels"] = torch.full_like(batch["labels"], -100)
            yield batch

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)
