"""D7: evaluation losses and the scores of generated tokens are finite, before a filter or an argmax can hide them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard import verdicts
from pytest_sftguard.records import EvaluationRecord, GenerationRecord, RunRecord
from pytest_sftguard.verdicts import Finding, Invariant, Outcome


class Reason(verdicts.Reason):
    """What is not finite in the evaluation or in the scores of generated tokens, or was not seen there."""

    SCORES_NOT_LOOKED_AT = "the scores of generated tokens were not looked at"
    NO_SCORES = "no scores of generated tokens were seen"
    SCORES = (
        "{observed} of {scores:# generated token} came from scores that are not finite, first in forward pass {first};"
        " {zero_ids} of {prompts:# answer} came out as token id 0 alone, as which greedy decoding reads NaN"
    )
    ZEROS = (
        "each of {observed:# answer} is the token id 0 over and over, as greedy decoding reads NaN, and the scores were"
        " not seen"
    )
    BATCHES = (
        "the loss of {observed} of {batches:# evaluation batch} is not finite (first: {first}); the Trainer leaves such"
        " batches out of its mean"
    )
    LOGGED = "the Trainer logged a loss that is not finite: {losses}"
    METRICS = "metrics of the evaluation were never finite: {metrics}"
    BEST_METRIC = "the best metric, by which a checkpoint is chosen, is not finite"
    UNLABELLED = "there is no supervised token in {unlabelled} of {rows:# evaluation row}"
    NO_BATCH = "the evaluation set gave no batch"
    NO_LABELS = "the evaluation set has no labels, and gives no loss"


@dataclass(frozen=True, kw_only=True)
class EvalAndDecodeFinite(Invariant):
    """No evaluation batch has a loss that is not finite, and no generated token was decoded from such scores."""

    max_unlabelled_fraction: float = 0.1
    """Share of evaluation rows that may be without a supervised token, as rows that lost it to truncation are. Alone in
    a batch the loss of each is 0/0; beside others it measures nothing, and nobody is told. In the report of
    `eval-nan-filtered` it was a third."""

    code: ClassVar[str] = "D7"

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Look at the answers' scores, which every run with questions has, and at the evaluation, where looked at."""
        decoded = list(self._generation(record, record.generation))
        yield from decoded
        if record.evaluation is not None:
            yield from self._evaluation(record.evaluation)
            return
        missing = self.not_looked(record, "evaluation")
        nothing_else = record.generation is None and not decoded
        if missing.outcome is Outcome.FAILED or missing.required or nothing_else:
            yield missing

    def _generation(self, record: RunRecord, seen: GenerationRecord | None) -> Iterator[Finding]:
        if seen is None:
            if record.questions:
                yield self.not_evaluated(Reason.SCORES_NOT_LOOKED_AT)
            return
        if not seen.scores >= 1:
            yield self.not_evaluated(Reason.NO_SCORES, required=not seen.own)
        if seen.nonfinite:
            counts = {"scores": seen.scores, "zero_ids": seen.zero_ids, "prompts": seen.prompts}
            yield self.failed(Reason.SCORES, observed=seen.nonfinite, limit=0, first=seen.first_nonfinite, **counts)
        if seen.zero_ids and seen.zero_ids == seen.prompts and not seen.scores:
            yield self.failed(Reason.ZEROS, observed=seen.zero_ids, limit=0)

    def _evaluation(self, seen: EvaluationRecord) -> Iterator[Finding]:
        if seen.nonfinite:
            first, total = seen.first_nonfinite, seen.batches + seen.batches_in_training
            yield self.failed(Reason.BATCHES, observed=seen.nonfinite, limit=0, batches=total, first=first)
        if losses := seen.nonfinite_losses:
            yield self.failed(Reason.LOGGED, observed=losses.count, limit=0, losses=losses)
        if metrics := seen.never_finite:
            yield self.failed(Reason.METRICS, observed=metrics.count, limit=0, metrics=metrics)
        if not seen.best_metric_finite:
            yield self.failed(Reason.BEST_METRIC)
        fraction = seen.unlabelled / seen.rows if seen.rows else 0.0
        if not fraction <= self.max_unlabelled_fraction:
            rows = {"unlabelled": seen.unlabelled, "rows": seen.rows}
            yield self.failed(Reason.UNLABELLED, observed=fraction, limit=self.max_unlabelled_fraction, **rows)
        if not seen.batches >= 1:
            yield self.not_evaluated(Reason.NO_BATCH)
        elif not seen.without_loss < seen.batches:
            yield self.not_evaluated(Reason.NO_LABELS, required=False)
