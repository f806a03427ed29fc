"""A18: the model is given the rows of the data set, with their tokens, mask and labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard import verdicts
from pytest_sftguard.records import RunRecord
from pytest_sftguard.verdicts import Finding, Invariant

_WHERE = "step {step}, row {row} of its micro-batch: "
_MORE = "; {rows:# row} of {total} differ so"


class Reason(verdicts.Reason):
    """How a row differs from that of the data set, or why they were not compared."""

    IDS = (
        _WHERE
        + "{observed} of {compared} tokens are not those of the data set, the first at place {place}:"
        + " {found}, where the data set has {expected}"
        + _MORE
    )
    REPLACED = (
        _WHERE
        + "it has other tokens than the data set's row, which has as many: {observed} of {compared} differ, the first"
        + " at place {place}: {found}, where the data set has {expected}"
        + _MORE
    )
    MASK = (
        _WHERE
        + "the attention mask is wrong at {observed} of the row's {compared} tokens, the first at place {place}:"
        + " {found}, where it should be {expected}"
        + _MORE
    )
    PADDING = (
        _WHERE
        + "the attention mask lets in {observed} of {compared} places of padding, the first at place {place}"
        + _MORE
    )
    LABELS = (
        _WHERE
        + "{observed} of {compared} labels are not those of the data set's row, the first at place {place}:"
        + " {found}, where it should be {expected}"
        + _MORE
    )
    OTHER_ROWS = "the collator makes rows of its own: none of {rows} was found in its micro-batch"


@dataclass(frozen=True, kw_only=True)
class RowsArrive(Invariant):
    """The rows that the collator was given are what the model is given.

    They may be in any order, padded on either side, truncated at an end, packed, or with special tokens added. The mask
    is 1 on the row's tokens and 0 on padding before it, unless the row brings a mask. Labels are those that the row
    brings; without them, each that is supervised is its own token.
    """

    code: ClassVar[str] = "A18"

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Look at each thing in which rows differ."""
        seen = record.arrival
        if seen is None:
            yield self.not_looked(record, "arrival")
            return
        found = {d.name: d for d in seen.deviations}
        changed = found["ids"].rows if "ids" in found else 0
        replaced = found["replaced"].rows if "replaced" in found else 0
        known = seen.arrived_rows + changed
        # a collator may make other texts of its rows; one that leaves most as they are makes none
        if not known >= max(1, replaced):
            rows = seen.unknown_rows + replaced
            yield self.not_evaluated(Reason.OTHER_ROWS, required=False, rows=rows)
            return
        for name, d in found.items():
            reason = Reason[name.upper()]
            yield self.failed(
                reason,
                step=d.step,
                observed=d.places,
                limit=0,
                row=d.row,
                place=d.place,
                compared=d.compared,
                found=d.found,
                expected=d.expected,
                rows=d.rows,
                total=known + replaced,
            )
