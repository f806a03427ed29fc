"""D9: a target's own `generate` answers with the adapter, from whole prompts, and leaves the model as it was."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard import verdicts
from pytest_sftguard.records import RunRecord
from pytest_sftguard.verdicts import Finding, Invariant


class Reason(verdicts.Reason):
    """How the answers are not those of the adapter."""

    NOT_SEEN = "no forward pass of the model was seen in `generate` that read a prompt"
    BASE = (
        "`generate` answers with the base: the first scores of {as_base} of {compared:# prompt} are those of the model"
        " with its adapter disabled"
    )
    SCORES = "the first scores in `generate` are not the adapter's own for the same tokens"
    TRUNCATED = "`generate` gave the model only a part of {observed} of {prompts:# prompt} ({example})"
    DROPOUT = "dropout was active in `generate`: {names}; it must set the model to evaluation mode"
    LEFT_TRAINING = "`generate` left the model in training mode, so that dropout is active in what comes after it"
    LEFT_CHANGED = "`generate` left another model than it was given: the scores of one prompt changed"
    SAMPLED = (
        "`generate` samples: {observed} of {prompts:# answer} changed with the random seed; if that is on purpose,"
        " answer greedily under the guard, or waive this"
    )


@dataclass(frozen=True, kw_only=True)
class AnswersFromAdapter(Invariant):
    """The first scores in the target's `generate` are the adapter's, nothing is random, and the model is left alone."""

    limit: float = 0.2
    """Largest distance of the scores after a prompt, relative to their norm. Measured 4e-6, in bfloat16 0.05, and 0.4
    to 1.5 where another model, a truncated prompt or no mask was behind the answer."""

    code: ClassVar[str] = "D9"
    required: ClassVar[bool] = False

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Look at what `generate` gave the model and got from it, then at how it left the model."""
        seen = record.answering
        if seen is None:
            yield self.not_looked(record, "answering")
            return
        if seen.left_change is None or not seen.left_change <= self.limit:
            yield self.failed(Reason.LEFT_CHANGED, observed=seen.left_change, limit=self.limit)
        elif not seen.compared:
            yield self.not_evaluated(Reason.NOT_SEEN)
        elif seen.as_base:
            yield self.failed(
                Reason.BASE, observed=seen.max_change, as_base=seen.as_base, compared=seen.compared, limit=self.limit
            )
        elif seen.max_change is None or not seen.max_change <= self.limit:
            yield self.failed(Reason.SCORES, observed=seen.max_change, limit=self.limit)
        if seen.truncated:
            yield self.failed(
                Reason.TRUNCATED, observed=seen.truncated, limit=0, prompts=seen.prompts, example=seen.truncated_example
            )
        yield from self.forbid(Reason.DROPOUT, seen.dropouts)
        if seen.left_training:
            yield self.failed(Reason.LEFT_TRAINING)
        # what dropout changed was not sampled
        if seen.resampled and not seen.dropouts:
            yield self.failed(Reason.SAMPLED, observed=seen.resampled, limit=0, prompts=seen.prompts)
