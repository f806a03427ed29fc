"""B17: within an epoch a row is trained on as often as the data set has it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard import verdicts
from pytest_sftguard.records import RunRecord
from pytest_sftguard.verdicts import Finding, Invariant


class Reason(verdicts.Reason):
    """How rows are repeated, or why they cannot be counted."""

    REPEATED = (
        "{observed:# row} came more often within an epoch than the data set has them: the first one {times:# time},"
        " and the data set has it {allowed:# time}"
    )
    UNCOUNTED = "rows were not counted: {why}"


@dataclass(frozen=True, kw_only=True)
class RowsNotRepeated(Invariant):
    """No row comes more often within an epoch than the data set has it.

    It sees a stream that each worker of the data loader delivers as a whole, and batches that are served twice. Rows
    that the data set itself repeats, and samplers that draw with replacement, are sound.
    """

    code: ClassVar[str] = "B17"

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Look at the rows that came too often."""
        seen = record.batches
        if seen is None:
            yield self.not_looked(record, "batches")
        elif seen.repeated_rows != 0:
            limit, times = seen.allowed, seen.times
            count = seen.repeated_rows
            yield self.failed(Reason.REPEATED, step=seen.step, observed=count, limit=limit, times=times, allowed=limit)
        elif not seen.compared_rows >= 1:
            yield self.not_evaluated(Reason.UNCOUNTED, required=False, why=seen.uncounted or "there were none")
