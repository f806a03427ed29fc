"""D3: the merged model is the model with its adapter."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from pytest_sftguard import verdicts
from pytest_sftguard.records import MergeRecord, RunRecord
from pytest_sftguard.records.learning import MIN_STEPS
from pytest_sftguard.verdicts import Finding, Invariant

_EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
_TF32_EPS = 2.0**-10


class Reason(verdicts.Reason):
    """What merging did to the model."""

    TIED = "merging changed {tensors}, which the adapter does not target: tied to what it does"
    NO_LOGITS = "no logits of merged {dtype} weights were compared"
    NOT_SAVED = "the merged model was not saved and loaded, and nothing says why"
    LOGITS = "logits of the merged model differ from those before merging by {observed:.3g}"
    SAVED_LOGITS = "logits of the merged model, saved and loaded, differ from those before merging by {observed:.3g}"
    NOT_COUNTED = "it was not seen what merging made of the adapter's change of the weights"
    SWALLOWED = (
        "merging into {dtype} leaves {swallowed:.1%} of the adapted weights as they were, and keeps {kept:.0%} of the"
        " adapter's change (least of it in {layers})"
    )
    SMALL = f"{SWALLOWED}: an adapter of {{steps:# step}} is too small to judge by"


@dataclass(frozen=True, kw_only=True)
class MergeEquivalence(Invariant):
    """Merging changes no logit beyond rounding, no tensor that is not adapted, and drops no part of the adapter.

    Greedy answers are the same where logits are: they can part only where the two best tokens are as near to each
    other as the rounding is large.
    """

    ulps: float = 24.0
    """Largest change of a logit in half precision, in units of the last place of the weights' type at the largest
    logit. The product of one rounded sum is rounded otherwise than the sum of two products, and layers add that up.
    Measured: 0.5 to 4 on tiny models, 2 to 7.7 on the one of six layers; 74 and more where a tied head is merged."""
    float32_rtol: float = 1e-4
    """The same in float32, relative to the largest logit: its last place is so fine that the depth of a model decides.
    Measured: 3e-7 on the tiny models, 4.5e-6 on the one of six layers; 0.4 and more where a tied head is merged."""
    max_swallowed: float = 0.4
    """Share of the weights that merging may leave as they were, because half of their last place is more than the
    adapter adds. Measured in bfloat16 after 30 steps: 0.03 at the learning rate 1e-3, 0.28 at 1e-4, 0.47 to 0.86 at
    1e-5, where a good part of the adapter is not in the merged model; 0.002 at the most in float32."""

    code: ClassVar[str] = "D3"

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Look at the tensors, at the logits before and after, and at what became of the adapter's change."""
        merge = record.merge
        if merge is None:
            yield self.not_looked(record, "merging")
            return
        if merge.touched:
            yield self.failed(Reason.TIED, observed=merge.touched.count, limit=0, tensors=merge.touched)
        yield from self._logits(record, merge)
        yield from self._swallowed(record, merge)

    def _logits(self, record: RunRecord, merge: MergeRecord) -> Iterator[Finding]:
        eps = _EPS.get(merge.dtype)
        if merge.max_abs_logit is None or merge.max_logit_change is None or eps is None:
            yield self.not_evaluated(Reason.NO_LOGITS, dtype=merge.dtype)
            return
        rtol = max(self.ulps * eps, self.float32_rtol)
        if record.precision == "tf32":
            rtol = max(rtol, self.ulps * _TF32_EPS)
        limit = rtol * merge.max_abs_logit
        changes = {Reason.LOGITS: merge.max_logit_change, Reason.SAVED_LOGITS: merge.max_saved_change}
        for reason, change in changes.items():
            if change is None and not merge.not_saved:
                yield self.not_evaluated(Reason.NOT_SAVED)
            elif change is not None and not (math.isfinite(limit) and change <= limit):
                yield self.failed(reason, observed=change, limit=limit)

    def _swallowed(self, record: RunRecord, merge: MergeRecord) -> Iterator[Finding]:
        if merge.swallowed is None or merge.kept is None:
            yield self.not_evaluated(Reason.NOT_COUNTED)
        elif not merge.swallowed <= self.max_swallowed:
            seen: dict[str, Any] = {"dtype": merge.dtype, "swallowed": merge.swallowed}
            seen |= {"kept": merge.kept, "layers": merge.least_kept}
            if len(record.steps) < MIN_STEPS and math.isfinite(merge.swallowed):
                yield self.not_evaluated(Reason.SMALL, required=False, steps=len(record.steps), **seen)
            else:
                yield self.failed(Reason.SWALLOWED, observed=merge.swallowed, limit=self.max_swallowed, **seen)
