"""D10: the checkpoint that is kept as the best is the best of the evaluations, and the model at the end is that one."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from pytest_sftguard import verdicts
from pytest_sftguard.records import KeptRecord, RunRecord
from pytest_sftguard.verdicts import Finding, Invariant

_SMALLER = {"loss", "nll", "perplexity", "ppl", "wer", "cer", "ter", "mse", "rmse", "mae", "eer", "error", "error_rate"}
"""Last words of metrics of which less is better."""
_GREATER = {
    *("accuracy", "acc", "f1", "precision", "recall", "auc", "auroc", "mcc", "bleu", "sacrebleu", "rouge1", "rouge2"),
    *("rougel", "rougelsum", "meteor", "chrf", "ndcg", "mrr", "exact_match", "r2"),
}
"""Last words of metrics of which more is better."""


class Reason(verdicts.Reason):
    """How the kept checkpoint is not the best one."""

    DIRECTION = (
        "greater_is_better is {greater}, and {metric} is better the other way round: the Trainer keeps the worst of its"
        " {evaluations:# evaluation}"
    )
    DIRECTION_BY_COURSE = (
        "greater_is_better is {greater}, and {metric} follows the evaluation loss (rank correlation {correlation:.2f}):"
        " the checkpoint of step {kept} has the highest evaluation loss of all"
    )
    UNKNOWN_DIRECTION = "whether more or less of {metric} is better cannot be told"
    OTHER_VALUE = "the Trainer holds {observed:.6g} for the best {metric}, and its evaluations gave {best:.6g}"
    NOT_SAVED = (
        "the best {metric}, {best:.6g}, was that of step {step_of_best}, and the checkpoint that is kept is of {kept}"
    )
    GONE = "the checkpoint that is the best one no longer exists at the end; was it rotated away?"
    NOT_LOADED = (
        "load_best_model_at_end is set, and the weights at the end are not those of the best checkpoint: {names}"
    )
    NOT_COMPARED = "the best checkpoint holds no trainable tensor to compare the end with"
    NO_FINITE = "no evaluation gave a finite {metric}"


@dataclass(frozen=True, kw_only=True)
class KeptCheckpointIsBest(Invariant):
    """By the history of its metric the kept checkpoint is the best, less of a loss is better, and it is loaded."""

    min_correlation: float = 0.9
    """Rank correlation with the evaluation loss from which a metric with an unknown name is taken for one of which less
    is better, if the highest loss of all was chosen by it as well. An accuracy may rise together with the loss where a
    training overfits, so that this never speaks against a metric with a known name."""
    min_evaluations: int = 5
    """Evaluations that such a correlation needs."""

    code: ClassVar[str] = "D10"
    required: ClassVar[bool] = False

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Look at the direction, then at the choice, then at what was loaded."""
        seen = record.kept
        if seen is None:
            yield self.not_looked(record, "kept_checkpoint")
            return
        finite = [v for v in seen.values if math.isfinite(v)]
        if not finite:
            yield self.not_evaluated(Reason.NO_FINITE, metric=seen.metric)
            return
        yield from self._direction(seen)
        if seen.loads:
            yield from self._choice(seen, max(finite) if seen.greater_is_better else min(finite))
            yield from self._loaded(seen)

    def _direction(self, seen: KeptRecord) -> Iterator[Finding]:
        greater = _greater_is_better(seen.metric)
        words: dict[str, Any] = {"greater": seen.greater_is_better, "metric": seen.metric}
        if greater is not None:
            if greater != seen.greater_is_better:
                yield self.failed(Reason.DIRECTION, evaluations=len(seen.values), **words)
            return
        correlation = _correlation(seen.values, seen.losses)
        # more of a metric that falls with the loss was asked for, or less of one that rises while it falls
        agrees = correlation if seen.greater_is_better else -correlation
        worst = max(seen.losses, default=math.nan)
        kept = [x for s, x in zip(seen.steps, seen.losses, strict=False) if s == seen.kept_step]
        enough = len(seen.values) >= self.min_evaluations and agrees >= self.min_correlation
        if enough and kept and kept[0] == worst:
            yield self.failed(Reason.DIRECTION_BY_COURSE, correlation=correlation, kept=seen.kept_step, **words)
        else:
            yield self.not_evaluated(Reason.UNKNOWN_DIRECTION, metric=seen.metric)

    def _choice(self, seen: KeptRecord, best: float) -> Iterator[Finding]:
        if seen.best_metric != best:
            yield self.failed(Reason.OTHER_VALUE, observed=seen.best_metric, metric=seen.metric, best=best)
            return
        steps = [s for s, v in zip(seen.steps, seen.values, strict=True) if v == best]
        if seen.kept_step not in steps:
            kept = "no step" if seen.kept_step is None else f"step {seen.kept_step}"
            yield self.failed(Reason.NOT_SAVED, metric=seen.metric, best=best, step_of_best=steps[0], kept=kept)

    def _loaded(self, seen: KeptRecord) -> Iterator[Finding]:
        if seen.gone:
            yield self.failed(Reason.GONE)
        elif seen.kept_step is not None:
            yield from self.forbid(Reason.NOT_LOADED, seen.differing)
            if not seen.compared:
                yield self.not_evaluated(Reason.NOT_COMPARED)


def _greater_is_better(metric: str) -> bool | None:
    """Whether more of a metric is better, by its last word; None where the name does not tell."""
    words = re.split(r"[^a-z0-9]+", metric.lower())
    ends = {"_".join(words[-n:]) for n in (1, 2)}
    return False if ends & _SMALLER else True if ends & _GREATER else None


def _correlation(values: tuple[float, ...], losses: tuple[float, ...]) -> float:
    """Spearman's rank correlation; 0 where there is none to be had."""
    if len(values) != len(losses) or not all(map(math.isfinite, (*values, *losses))):
        return 0.0
    ranks = [[sum(x < y for x in some) + sum(x == y for x in some) / 2 for y in some] for some in (values, losses)]
    means = [math.fsum(r) / len(r) for r in ranks]
    one, other = ([x - m for x in r] for r, m in zip(ranks, means, strict=True))
    scale = math.sqrt(math.fsum(x * x for x in one) * math.fsum(x * x for x in other))
    return math.fsum(x * y for x, y in zip(one, other, strict=True)) / scale if scale else 0.0
