"""A16: the micro-batches really had the rows that the cell names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from pytest_sftguard import verdicts
from pytest_sftguard.records import BatchesRecord, RunRecord
from pytest_sftguard.verdicts import Finding, General, Invariant

_NOT_REAL = "a batch of {asked} x {accumulation} did not happen: "


class Reason(verdicts.Reason):
    """What of the batch did not happen, or was not seen."""

    FEWER_ROWS = _NOT_REAL + "no micro-batch had more than {rows:# row}[[, and the data set has {dataset_rows}]]"
    MORE_ROWS = _NOT_REAL + "micro-batches had up to {rows:# row}"
    SHORT = _NOT_REAL + "{observed} of {total:# micro-batch} had fewer than {asked:# row}"
    LOADER = _NOT_REAL + "the data loader makes micro-batches of {rows:# row}"
    FEWER_MICRO_BATCHES = _NOT_REAL + "no step had more than {rows:# micro-batch}"
    NOT_KNOWN = "neither the inputs nor the data loader tell how many rows a micro-batch had"
    PACKED = "several sequences share a row, and the data loader does not tell how many"


@dataclass(frozen=True, kw_only=True)
class CellIsReal(Invariant):
    """Micro-batches had the rows, and steps the micro-batches, that the cell names; otherwise it is no evidence.

    The last micro-batch of an epoch may be short, and so may the last step. Where inputs hold a multiple of the rows,
    as pairs do, or fewer of them, as packs do, the data loader tells how many rows it collates.
    """

    code: ClassVar[str] = "A16"

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Compare the rows of the micro-batches, and the micro-batches of the steps, with the cell."""
        seen = record.batches
        if seen is None:
            yield self.not_looked(record, "batches")
            return
        if not record.steps:
            yield self.not_evaluated(General.NO_STEP)
            return
        yield from self._rows(record, seen)
        accumulated = max(len(s.micro_losses) for s in record.steps)
        if accumulated < record.gradient_accumulation_steps:
            yield self._no_evidence(record, Reason.FEWER_MICRO_BATCHES, rows=accumulated)

    def _rows(self, record: RunRecord, seen: BatchesRecord) -> Iterator[Finding]:
        asked, most = record.per_device_train_batch_size, max(seen.rows, default=None)
        if most == asked:
            short, allowed = sum(n < asked for n in seen.rows), _epochs(record, seen)
            if allowed is not None and short > allowed:
                total = len(seen.rows)
                yield self._no_evidence(record, Reason.SHORT, observed=short, total=total)
            return
        held = seen.loader_rows if seen.dataset_rows is None else min(seen.loader_rows or 0, seen.dataset_rows) or None
        if held is not None and held != asked:
            dataset_rows = seen.dataset_rows if held == seen.dataset_rows else None
            reason = Reason.FEWER_ROWS if dataset_rows is not None else Reason.LOADER
            yield self._no_evidence(record, reason, rows=held, dataset_rows=dataset_rows)
        elif held is None:
            yield self.not_evaluated(Reason.PACKED if seen.packed else Reason.NOT_KNOWN, required=False)
        elif most is not None and most < asked and not seen.packed:
            yield self._no_evidence(record, Reason.FEWER_ROWS, rows=most)
        elif most is not None and most > asked and most % asked:
            yield self._no_evidence(record, Reason.MORE_ROWS, rows=most)

    def _no_evidence(self, record: RunRecord, reason: Reason, **seen: Any) -> Finding:
        asked, accumulation = record.per_device_train_batch_size, record.gradient_accumulation_steps
        return self.not_evaluated(reason, asked=asked, accumulation=accumulation, **seen)


def _epochs(record: RunRecord, seen: BatchesRecord) -> int | None:
    """Number of epochs that the micro-batches are of, of which each may end in a short one; None if unknown."""
    if record.micro_batches_per_epoch:
        return -(-len(seen.rows) // record.micro_batches_per_epoch)
    return None
