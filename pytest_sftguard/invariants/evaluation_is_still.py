"""D11: nothing is random in an evaluation: no dropout is active, and a batch has the same loss twice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard import verdicts
from pytest_sftguard.records import RunRecord
from pytest_sftguard.verdicts import Finding, Invariant


class Reason(verdicts.Reason):
    """What moves in an evaluation."""

    DROPOUT = "dropout was active in evaluations: {names}"
    NOT_REPEATED = "the same evaluation batch, asked twice with the same random numbers, has two losses"
    NOT_ASKED_TWICE = "no evaluation batch with a finite loss was asked twice"


@dataclass(frozen=True, kw_only=True)
class EvaluationIsStill(Invariant):
    """No dropout is in training mode where the Trainer evaluates, and an evaluation batch repeats."""

    limit: float = 1e-5
    """Largest relative difference of the two losses, for sums on a device whose order varies. On a CPU it is 0."""

    code: ClassVar[str] = "D11"
    required: ClassVar[bool] = False

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Look at the training's own evaluations, and at those after it."""
        seen = record.evaluation
        if seen is None:
            yield self.not_looked(record, "evaluation")
            return
        yield from self.forbid(Reason.DROPOUT, seen.dropouts)
        if seen.repeat_change is None:
            yield self.not_evaluated(Reason.NOT_ASKED_TWICE)
        elif not seen.repeat_change <= self.limit:
            yield self.failed(Reason.NOT_REPEATED, observed=seen.repeat_change, limit=self.limit)
