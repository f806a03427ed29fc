"""A7: what is supervised is the answer, whole and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from pytest_sftguard import verdicts
from pytest_sftguard.records import DefectRecord, RunRecord
from pytest_sftguard.verdicts import Finding, Invariant

_A_PART_MAY = ("unsupervised", "truncated", "prompt_supervised_unmatched")
_ENOUGH = 8
"""Rows of which one may be lost: below twenty, a twentieth is no whole row."""

_ROWS = "{observed} of {total:# row} {where} "
_SUCH_AS = "[[: {example}]]"


class Reason(verdicts.Reason):
    """What is wrong with rows: the defects of the record, by their names."""

    NOT_SEEN = "no row with labels was seen"
    UNSUPERVISED = _ROWS + "had no label that counts" + _SUCH_AS
    BARREN = "{observed} of {total:# micro-batch} {where} had no label that counts in any row" + _SUCH_AS
    MISMATCHED = _ROWS + "had labels that are not their own tokens, in place" + _SUCH_AS
    UNKNOWN_ID = _ROWS + "held token ids that the embedding does not have" + _SUCH_AS
    UNKNOWN_LABEL = _ROWS + "held labels that the vocabulary does not have" + _SUCH_AS
    DOUBLED_BOS = _ROWS + "began with two BOS tokens" + _SUCH_AS
    TRUNCATED = _ROWS + "had the greatest length and, unlike the others, no supervised end token" + _SUCH_AS
    PROMPT_SUPERVISED = _ROWS + "held one of the target's questions and supervised the prompt" + _SUCH_AS
    PROMPT_SUPERVISED_UNMATCHED = _ROWS + "were supervised from their first token on" + _SUCH_AS
    WRONG_ANSWER = _ROWS + "held one of the target's questions and did not supervise its answer" + _SUCH_AS
    ENDLESS = _ROWS + "held one of the target's questions and did not supervise an end token" + _SUCH_AS
    PADDING_SUPERVISED = _ROWS + "supervised padding" + _SUCH_AS
    HIDDEN_TOKENS = _ROWS + "had tokens that the attention mask hides" + _SUCH_AS
    OTHER = _ROWS + "had the defect {defect}" + _SUCH_AS


@dataclass(frozen=True, kw_only=True)
class SupervisionAudit(Invariant):
    """Every row supervises its answer and end token, each label is its token, and nothing is truncated or unknown."""

    max_lost_fraction: float = 0.05
    """Share of the rows that may have no label, be truncated at the maximal length, or be plain text without a prompt.
    Truncation loses a few of the longest rows of many data sets; the failures that people met lose 30 % and more."""

    code: ClassVar[str] = "A7"

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Look at what was found in the micro-batches, and in the data set."""
        if (seen := record.supervision) is None:
            yield self.not_looked(record, "supervision")
            return
        if not (seen.trained_rows >= 1 or seen.dataset_rows >= 1):
            yield self.not_evaluated(Reason.NOT_SEEN)
            return
        for where, rows, defects in (
            ("as trained on", seen.trained_rows, seen.trained_defects),
            ("of the data set", seen.dataset_rows, seen.dataset_defects),
        ):
            for defect in defects:
                total = seen.micro_batches if defect.name == "barren" else rows
                allowed = self._allowed(total) if defect.name in _A_PART_MAY else 0
                if not defect.rows <= allowed:
                    yield self._failed(defect, limit=allowed, total=total, where=where)

    def _allowed(self, rows: int) -> float:
        return max(self.max_lost_fraction * rows, 1 if rows >= _ENOUGH else 0)

    def _failed(self, defect: DefectRecord, **seen: Any) -> Finding:
        reason = Reason.__members__.get(defect.name.upper(), Reason.OTHER)
        seen |= {"defect": defect.name, "example": defect.example}
        return self.failed(reason, step=defect.step, observed=defect.rows, **seen)
