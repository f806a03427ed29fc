"""The evaluation set: raw losses of its batches, before the Trainer leaves out those that are not finite."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

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

    def attach(self, started: Started) -> None:
        """Read what `prediction_step` returns, which the Trainer averages."""
        trainer: Any = started.trainer
        trainer.prediction_step = partial(self._watched, trainer.prediction_step)

    def _watched(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
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
        for name_or_set in sets:
            for batch in itertools.islice(trainer.get_eval_dataloader(name_or_set), _BATCHES):
                labels = batch.get("labels")
                if isinstance(labels, Tensor) and labels.ndim == 2 and not labels.is_floating_point():
                    rows += len(labels)
                    unlabelled += int((labels[:, 1:] == IGNORED).all(1).sum())
                after.append(_loss_of(trainer, batch))
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
            )
        }


def _loss_of(trainer: Any, batch: Any) -> Tensor | None:
    """Return whether the loss of one batch is not finite, in the training's arithmetic; None where it has no loss."""
    model = trainer.model
    with forwards.evaluating(model), trainer.accelerator.autocast():
        return _bad(trainer.prediction_step(model, batch, prediction_loss_only=True)[0])


def _bad(loss: Any) -> Tensor | None:
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
