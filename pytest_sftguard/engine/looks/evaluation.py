"""The evaluation set: raw losses of its batches, before the Trainer leaves out those that are not finite."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from pytest_sftguard.engine.after import forwards
from pytest_sftguard.engine.looks import InapplicableError, Look, Scene
from pytest_sftguard.records import EvaluationRecord, Names

_BATCHES = 32
"""Batches of each evaluation set that are looked at after the training."""
_IGNORED = -100


class Evaluation(Look):
    """Watches the evaluations of the training, and evaluates once more after it."""

    needs = "trained"

    def __init__(self) -> None:
        self._seen: list[Tensor | None] = []

    def attach(self, scene: Scene) -> None:
        """Look at what `prediction_step` returns, from which the Trainer makes its mean."""
        trainer: Any = scene.trainer
        trainer.prediction_step = self._watched(trainer.prediction_step)

    def _watched(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            loss = result[0] if isinstance(result, tuple) else result
            self._seen.append(_bad(loss))
            return result

        return wrapped

    def conclude(self, scene: Scene) -> dict[str, Any]:
        """Evaluate, a bounded number of batches of each set, and look at what the training's evaluations left."""
        trainer: Any = scene.trainer
        trainer.__dict__.pop("prediction_step", None)
        sets = _sets(trainer)
        if not sets:
            raise InapplicableError("the target's Trainer has no eval_dataset")
        in_training, self._seen = self._seen, []
        rows = unlabelled = 0
        for name, dataset in sets.items():
            for batch in _batches(trainer, name, dataset):
                labels = batch.get("labels")
                if isinstance(labels, Tensor) and labels.ndim == 2 and not labels.is_floating_point():
                    rows += len(labels)
                    unlabelled += int((labels[:, 1:] == _IGNORED).all(1).sum())
                self._seen.append(_loss_of(trainer, scene, batch))
        losses, best = _logged(trainer)
        flags = [("in the training's evaluations", s) for s in in_training] + [
            ("after the training", s) for s in self._seen
        ]
        bad = [f"batch {i} {when}" for when, group in itertools.groupby(flags, lambda f: f[0])
               for i, (_, flag) in enumerate(group, 1) if flag is not None and bool(flag)]  # fmt: skip
        return {
            "evaluation": EvaluationRecord(
                batches=len(self._seen),
                batches_in_training=len(in_training),
                nonfinite=len(bad),
                first_nonfinite=bad[0] if bad else "",
                without_loss=sum(s is None for s in self._seen),
                rows=rows,
                unlabelled=unlabelled,
                nonfinite_losses=Names.of(n for n, values in losses.items() if n.endswith("loss") and _any_bad(values)),
                never_finite=Names.of(n for n, values in losses.items() if not any(map(math.isfinite, values))),
                best_metric_finite=best is None or math.isfinite(best),
            )
        }


def _sets(trainer: Any) -> dict[str, Any]:
    given = trainer.eval_dataset
    if isinstance(given, Mapping):
        return dict(given)
    return {} if given is None else {"": given}


def _batches(trainer: Any, name: str, dataset: Any) -> Iterator[Any]:
    loader = trainer.get_eval_dataloader(name or dataset)
    return itertools.islice(iter(loader), _BATCHES)


def _loss_of(trainer: Any, scene: Scene, batch: Any) -> Tensor | None:
    """Whether the loss of one batch is not finite, in the training's arithmetic; None where there is no loss."""
    model = trainer.model
    with forwards.evaluating(model), trainer.accelerator.autocast():
        return _bad(trainer.prediction_step(model, batch, prediction_loss_only=True)[0])


def _bad(loss: Any) -> Tensor | None:
    return ~loss.detach().isfinite().all() if isinstance(loss, Tensor) else None


def _logged(trainer: Any) -> tuple[dict[str, list[float]], float | None]:
    """Every metric of the training's evaluations, by its name, and the best one."""
    metrics: dict[str, list[float]] = {}
    for line in trainer.state.log_history:
        for name, value in line.items():
            if name.startswith("eval_") and isinstance(value, (int, float)):
                metrics.setdefault(name, []).append(float(value))
    best = trainer.state.best_metric
    return metrics, None if best is None else float(best)


def _any_bad(values: list[float]) -> bool:
    return not all(map(math.isfinite, values))
