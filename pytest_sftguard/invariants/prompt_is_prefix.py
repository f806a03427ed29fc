"""A8: generation is given what the rows of the training begin with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard import verdicts
from pytest_sftguard.records import RunRecord
from pytest_sftguard.verdicts import Finding, Invariant


class Reason(verdicts.Reason):
    """How the prompts of generation differ from those of the training."""

    NOTHING_SHARED = "no row holds one of the questions, and prompts in training and generation have no end in common"
    DEVIATING = "{observed} of {total:# row} did not begin with the tokens that generation is given[[: {example}]]"
    SHORT = "{observed} of {total:# row} had more before their first label than generation is given[[: {example}]]"
    OTHER_FORM = "{observed} of {total:# prompt end} differed between training and generation[[: {example}]]"


@dataclass(frozen=True, kw_only=True)
class PromptIsPrefix(Invariant):
    """The tokens that generation is given are those that the row begins with, up to its first label at least.

    Where none of the questions is in the training rows, the prompts of both begin and end alike.
    """

    code: ClassVar[str] = "A8"

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Look at the rows that were compared."""
        if (seen := record.prompts) is None:
            yield self.not_looked(record, "prompts")
            return
        if not (seen.matched >= 1 or seen.forms >= 1):
            yield self.not_evaluated(Reason.NOTHING_SHARED, required=False)
        for reason, count, total in (
            (Reason.DEVIATING, seen.deviating, seen.matched),
            (Reason.SHORT, seen.short, seen.matched),
            (Reason.OTHER_FORM, seen.strange_forms, seen.forms),
        ):
            if count != 0:
                yield self.failed(reason, observed=count, limit=0, total=total, example=seen.example)
