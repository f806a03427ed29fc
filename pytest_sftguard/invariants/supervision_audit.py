"""A7: what is supervised is the answer, whole and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard.records import DefectRecord, RunRecord
from pytest_sftguard.verdicts import Finding, Invariant

_SAID = {
    "unsupervised": "rows have no label that counts",
    "barren": "micro-batches have no label that counts in any of their rows",
    "mismatched": "rows have labels that are not their own tokens, in place",
    "unknown_id": "rows hold token ids that the embedding does not have",
    "unknown_label": "rows hold labels that the vocabulary does not have",
    "doubled_bos": "rows begin with two BOS tokens",
    "truncated": "rows of the greatest length do not end as the others do, in an end token that is supervised",
    "prompt_supervised": "rows with one of the target's questions supervise the prompt",
    "prompt_supervised_unmatched": "rows are supervised from their first token on, and the target asks questions",
    "wrong_answer": "rows with one of the target's questions do not supervise its answer",
    "endless": "rows with one of the target's questions do not supervise an end token",
}
_A_PART_MAY = ("unsupervised", "truncated", "prompt_supervised_unmatched")
_ENOUGH = 8
"""Rows of which one may be lost: below twenty, a twentieth is no whole row."""


@dataclass(frozen=True, kw_only=True)
class SupervisionAudit(Invariant):
    """Every row supervises its answer and its end token, each label is its token, and nothing is cut or unknown."""

    max_lost_fraction: float = 0.05
    """Share of the rows that may have no label, be cut at the maximal length, or be plain text without a prompt.
    Truncation loses a few of the longest rows of many data sets; the failures that people met lose 30 % and more."""

    code: ClassVar[str] = "A7"

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Look at what was found in the micro-batches, and in the data set."""
        seen = record.supervision
        if seen is None:
            yield self.not_looked(record, "supervision")
            return
        if not (seen.trained_rows >= 1 or seen.dataset_rows >= 1):
            yield self.not_evaluated("no row with labels was seen")
            return
        for where, rows, defects in (
            ("as trained on", seen.trained_rows, seen.trained_defects),
            ("of the data set", seen.dataset_rows, seen.dataset_defects),
        ):
            for defect in defects:
                total = seen.micro_batches if defect.name == "barren" else rows
                allowed = self._allowed(total) if defect.name in _A_PART_MAY else 0
                if not defect.rows <= allowed:
                    yield self._failed(defect, total, where, allowed)

    def _allowed(self, rows: int) -> float:
        return max(self.max_lost_fraction * rows, 1 if rows >= _ENOUGH else 0)

    def _failed(self, defect: DefectRecord, total: int, where: str, allowed: float) -> Finding:
        said = _SAID.get(defect.name, defect.name)
        example = f": {defect.example}" if defect.example else ""
        return self.failed(
            f"{defect.rows} of {total} {said}, {where}{example}",
            step=defect.step, observed=defect.rows, limit=allowed,
        )  # fmt: skip
