"""B7: every trainable tensor and every optimizer state is finite after every step, and in the saved file."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from pytest_sftguard import verdicts
from pytest_sftguard.records import Names, RunRecord
from pytest_sftguard.verdicts import Finding, General, Invariant


class Reason(verdicts.Reason):
    """Where NaN or infinity is."""

    NOT_SEEN = "no trainable tensor was seen after a step"
    WEIGHTS = "{count:# trainable tensor} held NaN or infinity after step {step}: {names}"
    MOMENTS = "{count:# optimizer state} held NaN or infinity after step {step}: {names}"
    AT_THE_END = "{count} of {total:# trainable tensor} were not finite at the end: {names}"
    IN_THE_FILE = "{count:# tensor} in the saved file held NaN or infinity: {names}"


@dataclass(frozen=True, kw_only=True)
class WeightsAndMomentsFinite(Invariant):
    """NaN and infinity are in no trainable tensor and in no optimizer state, after skipped steps too."""

    code: ClassVar[str] = "B7"

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Look at the tensors after every step, at the end, and in the file."""
        if not record.steps or not (record.adapter or record.adapter_out_of_reach):
            yield self.not_evaluated(Reason.NOT_SEEN)
            return
        for s in record.steps:
            for reason, names in ((Reason.WEIGHTS, s.nonfinite_weights), (Reason.MOMENTS, s.nonfinite_moments)):
                if names:
                    yield self._at(reason, names, step=s.step)
            # from here on, the end and the file would only say it again
            if s.nonfinite_weights or s.nonfinite_moments:
                return
        if record.adapter_out_of_reach:
            yield self.not_evaluated(General.OUT_OF_REACH)
            return
        bad = [t for t in record.adapter if t.final_norm is None or not math.isfinite(t.final_norm)]
        if bad:
            names = Names.of(t.name for t in bad)
            yield self._at(Reason.AT_THE_END, names, observed=bad[0].final_norm, total=len(record.adapter))
        elif record.round_trip is not None and record.round_trip.nonfinite:
            yield self._at(Reason.IN_THE_FILE, record.round_trip.nonfinite)

    def _at(self, reason: Reason, names: Names, observed: float | None = math.nan, **seen: Any) -> Finding:
        return self.failed(reason, observed=observed, limit="finite", count=names.count, names=names, **seen)
