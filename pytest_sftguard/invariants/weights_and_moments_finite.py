"""B7: every trainable tensor and every optimizer state is finite after every step, and in the saved file."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard.invariants._due import OUT_OF_REACH
from pytest_sftguard.records import Names, RunRecord
from pytest_sftguard.verdicts import Finding, Invariant


@dataclass(frozen=True, kw_only=True)
class WeightsAndMomentsFinite(Invariant):
    """NaN and infinity are in no trainable tensor and in no optimizer state, after skipped steps too."""

    code: ClassVar[str] = "B7"

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Look at the tensors after every step, at the end, and in the file."""
        if not record.steps or not (record.adapter or record.adapter_out_of_reach):
            yield self.not_evaluated("no trainable tensor was seen after a step")
            return
        for s in record.steps:
            for kind, names in (("weights", s.nonfinite_weights), ("optimizer states", s.nonfinite_moments)):
                if names:
                    yield self.failed(
                        f"{names.count} {kind} are not finite after step {s.step}: {names}",
                        step=s.step, observed=math.nan, limit="finite",
                    )  # fmt: skip
            if s.nonfinite_weights or s.nonfinite_moments:
                return  # from here on, the end and the file would only say it again
        if record.adapter_out_of_reach:
            yield self.not_evaluated(OUT_OF_REACH)
            return
        bad = [t for t in record.adapter if t.final_norm is None or not math.isfinite(t.final_norm)]
        if bad:
            yield self.failed(
                f"{len(bad)} of {len(record.adapter)} trainable tensors are not finite at the end:"
                f" {Names.of(t.name for t in bad)}",
                observed=bad[0].final_norm, limit="finite",
            )  # fmt: skip
        elif record.round_trip is not None and record.round_trip.nonfinite:
            yield self.failed(
                f"{record.round_trip.nonfinite.count} tensors in the saved file are not finite:"
                f" {record.round_trip.nonfinite}",
                observed=math.nan, limit="finite",
            )  # fmt: skip
