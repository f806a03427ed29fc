"""B11: the grad_norm that the Trainer logs is the norm of the gradients, and the optimizer gets them clipped by it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard.records import RunRecord
from pytest_sftguard.verdicts import Finding, Invariant


@dataclass(frozen=True, kw_only=True)
class NormHonest(Invariant):
    """The logged norm is the one seen at the source, and what the optimizer was given has it, or `max_grad_norm`.

    So nothing was scaled, clipped or cleaned in between but by the Trainer's own clipping.
    """

    rtol: float = 1e-3
    """Largest relative difference: both are norms of the same gradients, summed in another order."""
    half_rtol: float = 2**-7
    """The same where trainable tensors are bfloat16 or float16: the Trainer's norm is then rounded to their type, for
    each tensor and once more for all of them, each time by 2**-9 at the most; measured up to 2.7e-3."""

    code: ClassVar[str] = "B11"
    required: ClassVar[bool] = False

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Compare step by step, then line by line; what the loss scaler skipped may be anything."""
        half = any(t.dtype in ("bfloat16", "float16") for t in record.adapter)
        rtol = self.half_rtol if half else self.rtol
        yield from self._given(record, rtol)
        yield from self._logged(record, rtol)

    def _given(self, record: RunRecord, rtol: float) -> Iterator[Finding]:
        for s in record.steps:
            if s.effect == "skipped_by_scaler" or s.grad_norm is None:
                continue
            if s.received_grad_norm is None:
                yield self.not_evaluated(f"what the optimizer was given at step {s.step} was not seen", required=True)
                return
            if not math.isfinite(s.grad_norm):
                continue  # for gradients_finite to say; and where it was cleaned, for log_honest
            if record.observed and record.max_grad_norm is None:
                continue  # how a loop of the user's own clips is not known
            due = _clipped(s.grad_norm, record.max_grad_norm)
            if not abs(s.received_grad_norm - due) <= rtol * due:
                yield self.failed(
                    f"the optimizer was given gradients of norm {s.received_grad_norm:.6g} at step {s.step}, where the"
                    f" norm was {s.grad_norm:.6g} and max_grad_norm is {record.max_grad_norm}",
                    step=s.step, observed=s.received_grad_norm, limit=due,
                )  # fmt: skip
                return

    def _logged(self, record: RunRecord, rtol: float) -> Iterator[Finding]:
        steps = {s.step: s for s in record.steps}
        lines = [(steps[line.step], line) for line in record.log if line.step in steps and line.grad_norm is not None]
        lines = [(step, line) for step, line in lines if step.effect != "skipped_by_scaler"]
        if not lines:
            yield self.not_evaluated("the Trainer logged no grad_norm of a step that was taken")
            return
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


def _clipped(norm: float, max_norm: float | None) -> float:
    """The norm after `clip_grad_norm_`, whose divisor is kept from zero by 1e-6."""
    return min(norm, norm * max_norm / (norm + 1e-6)) if max_norm else norm
