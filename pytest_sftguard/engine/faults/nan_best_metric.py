"""A metric that is NaN at first may become or block the best checkpoint: not in this version."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from pytest_sftguard.engine.faults import Fault

if TYPE_CHECKING:
    from transformers import Trainer


class NanBestMetric(Fault):
    """The first evaluation's metric is undefined, as a correlation of constant answers is; the later ones are fine.

    A control: the Trainer starts from infinity, and finds the best of the others.
    """

    id = "nan-best-metric"
    source = "https://github.com/Bjarten/early-stopping-pytorch/pull/28"
    injects = "a metric by which the best checkpoint is chosen is NaN in the first evaluation"

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """Evaluate every two steps, and choose by the metric."""
        trainer: Any = build(**arguments)
        if trainer.eval_dataset is None:
            trainer.eval_dataset = list(itertools.islice(iter(trainer.train_dataset), 8))
        args = trainer.args
        args.eval_strategy, args.eval_steps = IntervalStrategy.STEPS, 2
        args.save_strategy, args.save_steps = SaveStrategy.STEPS, 2
        args.metric_for_best_model, args.greater_is_better, args.load_best_model_at_end = "eval_score", True, False
        evaluate, scores = trainer.evaluation_loop, itertools.count()

        def evaluation_loop(*given: Any, **more: Any) -> Any:
            output = evaluate(*given, **more)
            turn = next(scores)
            output.metrics["eval_score"] = math.nan if turn == 0 else float(turn)
            return output

        trainer.evaluation_loop = evaluation_loop
        return trainer
