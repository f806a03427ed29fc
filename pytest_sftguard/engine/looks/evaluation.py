"""The evaluation set: raw losses of its batches, before the Trainer leaves out those that are not finite."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pytest_sftguard.engine.after import forwards
from pytest_sftguard.engine.data.rows import IGNORED
from pytest_sftguard.engine.looks import InapplicableError, Look
from pytest_sftguard.engine.stages import Started, Trained
from pytest_sftguard.records import EvaluationRecord, Names

_BATCHES = 32
"""Batches of each evaluation set that are evaluated after the training."""


class Evaluation(Look[Trained]):
    """Watches the evaluations of the training, and evaluates once more after it."""

    def __init__(self) -> None:
        self._seen: list[Tensor | None] = []
        self._dropouts: set[str] = set()

    def attach(self, started: Started) -> None:
        """Read what `prediction_step` returns, which the Trainer averages."""
        trainer: Any = started.trainer
        self._model = trainer.model
        trainer.prediction_step = partial(self._watched, trainer.prediction_step)

    def _watched(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with forwards.dropping(self._model) as active:
            result = original(*args, **kwargs)
        self._dropouts |= active
        self._seen.append(_bad(result[0] if isinstance(result, tuple) else result))
        return result

    def conclude(self, reached: Trained) -> dict[str, Any]:
        """Evaluate a bounded number of batches of each set, and read what the training's evaluations left."""
        trainer: Any = reached.trainer
        trainer.__dict__.pop("prediction_step", None)
        given = trainer.eval_dataset
        sets = given if isinstance(given, Mapping) else [] if given is None else [given]
        if not sets:
            raise InapplicableError("the target's Trainer has no eval_dataset")
        in_training, after = self._seen, []
        rows = unlabelled = 0
        change: float | None = None
        for name_or_set in sets:
            for batch in itertools.islice(trainer.get_eval_dataloader(name_or_set), _BATCHES):
                labels = batch.get("labels") if isinstance(batch, Mapping) else None
                if isinstance(labels, Tensor) and labels.ndim == 2 and not labels.is_floating_point():
                    rows += len(labels)
                    unlabelled += int((labels[:, 1:] == IGNORED).all(1).sum())
                with forwards.dropping(trainer.model) as active:
                    loss = _loss_of(trainer, batch)
                    change = _repeated(trainer, batch) if change is None else change
                self._dropouts |= active
                after.append(_bad(loss))
        losses, best = _logged(trainer)
        bad = [
            f"batch {i} {when}"
            for when, flags in (("in the training's evaluations", in_training), ("after the training", after))
            for i, flag in enumerate(flags, 1)
            if flag is not None and bool(flag)
        ]
        return {
            "evaluation": EvaluationRecord(
                batches=len(after),
                batches_in_training=len(in_training),
                nonfinite=len(bad),
                first_nonfinite=bad[0] if bad else "",
                without_loss=sum(s is None for s in after),
                rows=rows,
                unlabelled=unlabelled,
                nonfinite_losses=Names.of(
                    n for n, values in losses.items() if n.endswith("loss") and not all(map(math.isfinite, values))
                ),
                never_finite=Names.of(n for n, values in losses.items() if not any(map(math.isfinite, values))),
                best_metric_finite=best is None or math.isfinite(best),
                dropouts=Names.of(sorted(self._dropouts)),
                repeat_change=change,
            )
        }


def _loss_of(trainer: Any, batch: Any) -> Any:
    """Return the loss of one batch, in the training's arithmetic; None where it has no loss."""
    model = trainer.model
    with forwards.evaluating(model), trainer.accelerator.autocast():
        return trainer.prediction_step(model, batch, prediction_loss_only=True)[0]


def _repeated(trainer: Any, batch: Any) -> float | None:
    """Return the relative difference of the losses of a batch that is evaluated twice with equal random numbers."""
    losses = []
    for _ in range(2):
        torch.manual_seed(0)
        loss = _loss_of(trainer, batch)
        if not isinstance(loss, Tensor) or not loss.isfinite().all():
            return None
        losses.append(float(loss.float().mean()))
    return abs(losses[0] - losses[1]) / max(abs(losses[0]), 1e-20) if losses[0] != losses[1] else 0.0


def _bad(loss: Any) -> Tensor | None:
    """Return whether a loss is not finite; None where there is none."""
    return ~loss.detach().isfinite().all() if isinstance(loss, Tensor) else None


def _logged(trainer: Any) -> tuple[dict[str, list[float]], float | None]:
    """Return every metric of the training's evaluations by its name, and the best metric."""
    metrics: dict[str, list[float]] = {}
    for line in trainer.state.log_history:
        for name, value in line.items():
            if name.startswith("eval_") and isinstance(value, (int, float)):
                metrics.setdefault(name, []).append(float(value))
    best = trainer.state.best_metric
    return metrics, None if best is None else float(best)
