"""D7: evaluation losses and the scores of generated tokens are finite, before a filter or an argmax can hide them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard.records import EvaluationRecord, GenerationRecord, RunRecord
from pytest_sftguard.verdicts import Finding, Invariant, Outcome


@dataclass(frozen=True, kw_only=True)
class EvalAndDecodeFinite(Invariant):
    """No evaluation batch has a loss that is not finite, and no generated token was decoded from such scores."""

    max_unlabelled_fraction: float = 0.1
    """Share of evaluation rows that may be without a supervised token, as rows that were cut too short are. Alone in a
    batch the loss of each is 0/0; beside others it measures nothing, and nobody is told. In the report of
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
                yield self.not_evaluated("the scores of generated tokens were not looked at")
            return
        if not seen.scores >= 1:
            yield self.not_evaluated("no scores of generated tokens were seen", required=not seen.own)
        if seen.nonfinite:
            yield self.failed(
                f"{seen.nonfinite} of {seen.scores} generated tokens were decoded from scores that are not finite,"
                f" first in forward pass {seen.first_nonfinite}; greedy decoding reads NaN as some id"
                f" ({seen.zero_ids} of {seen.prompts} answers are the id 0 over and over)",
                observed=seen.nonfinite, limit=0,
            )  # fmt: skip
        if seen.zero_ids and seen.zero_ids == seen.prompts and not seen.scores:
            yield self.failed(
                f"all {seen.prompts} answers are the token id 0 over and over, as greedy decoding reads NaN, and their"
                " scores were not seen",
                observed=seen.zero_ids, limit=0,
            )  # fmt: skip

    def _evaluation(self, seen: EvaluationRecord) -> Iterator[Finding]:
        if seen.nonfinite:
            total = seen.batches + seen.batches_in_training
            yield self.failed(
                f"the loss of {seen.nonfinite} of {total} evaluation batches is not finite"
                f" (first: {seen.first_nonfinite}); the Trainer leaves such out of its mean",
                observed=seen.nonfinite, limit=0,
            )  # fmt: skip
        if seen.nonfinite_losses:
            yield self.failed(
                f"the Trainer logged a loss that is not finite: {seen.nonfinite_losses}",
                observed=seen.nonfinite_losses.count, limit=0,
            )  # fmt: skip
        if seen.never_finite:
            yield self.failed(
                f"metrics of the evaluation were never finite: {seen.never_finite}",
                observed=seen.never_finite.count, limit=0,
            )  # fmt: skip
        if not seen.best_metric_finite:
            yield self.failed("the best metric, by which a checkpoint is chosen, is not finite")
        fraction = seen.unlabelled / seen.rows if seen.rows else 0.0
        if not fraction <= self.max_unlabelled_fraction:
            yield self.failed(
                f"{seen.unlabelled} of {seen.rows} evaluation rows have no supervised token",
                observed=fraction, limit=self.max_unlabelled_fraction,
            )  # fmt: skip
        if not seen.batches >= 1:
            yield self.not_evaluated("the evaluation set gave no batch")
        elif not seen.without_loss < seen.batches:
            yield self.not_evaluated("the evaluation set has no labels, and gives no loss", required=False)
