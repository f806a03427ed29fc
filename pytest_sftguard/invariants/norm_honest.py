"""B11: the grad_norm that the Trainer logs is the norm of the gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard.records import RunRecord
from pytest_sftguard.verdicts import Finding, Invariant


@dataclass(frozen=True, kw_only=True)
class NormHonest(Invariant):
    """The logged norm equals the one seen at the source, so that nothing was scaled, clipped or cleaned in between."""

    rtol: float = 1e-3
    """Largest relative difference: both are norms of the same gradients, summed in another order."""
    half_rtol: float = 2**-7
    """The same where trainable tensors are bfloat16 or float16: the Trainer's norm is then rounded to their type, for
    each tensor and once more for all of them, each time by 2**-9 at the most; measured up to 2.7e-3."""

    code: ClassVar[str] = "B11"
    required: ClassVar[bool] = False

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Compare line by line; a step that the loss scaler skipped may be logged as NaN."""
        steps = {s.step: s for s in record.steps}
        lines = [(steps[line.step], line) for line in record.log if line.step in steps and line.grad_norm is not None]
        lines = [(step, line) for step, line in lines if step.effect != "skipped_by_scaler"]
        if not lines:
            yield self.not_evaluated("the Trainer logged no grad_norm of a step that was taken")
            return
        half = any(t.dtype in ("bfloat16", "float16") for t in record.adapter)
        rtol = self.half_rtol if half else self.rtol
        for step, line in lines:
            seen = math.nan if step.grad_norm is None else step.grad_norm
            logged = math.nan if line.grad_norm is None else line.grad_norm
            if math.isnan(seen) and math.isnan(logged):
                continue  # the log is honest here; that the gradients are NaN is for gradients_finite to say
            if seen == logged:
                continue
            if not (math.isfinite(seen) and abs(logged - seen) <= rtol * abs(seen)):
                yield self.failed(
                    f"the Trainer logged grad_norm {logged:.6g} at step {step.step}, where the gradients' norm was"
                    f" {seen:.6g}",
                    step=step.step,
                    observed=logged,
                    limit=seen,
                )
                return
