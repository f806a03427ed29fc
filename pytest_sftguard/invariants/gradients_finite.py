"""B2: every gradient is finite, unscaled and before clipping."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from pytest_sftguard import verdicts
from pytest_sftguard.records import RunRecord
from pytest_sftguard.verdicts import Finding, General, Invariant


class Reason(verdicts.Reason):
    """What is wrong with a gradient."""

    NONFINITE = "grad_norm is not finite at {bad} of {steps:# step} (first: step {step}[[ in {names}]])"
    NOT_SEEN = "grad_norm was not seen or not finite at {bad} of {steps:# step} (first: step {step}[[ in {names}]])"


@dataclass(frozen=True, kw_only=True)
class GradientsFinite(Invariant):
    """No step has a NaN or infinite gradient, but for one that the loss scaler skipped, backing off."""

    code: ClassVar[str] = "B2"

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Look at the unscaled, unclipped gradients of every step."""
        if all(s.grad_norm is None for s in record.steps):
            yield self.not_evaluated(General.NO_GRADIENT)
            return
        bad = [s for s in record.taken_steps if not s.gradients_finite]
        if bad:
            first, limit = bad[0], "finite, or skipped by the loss scaler"
            reason = Reason.NOT_SEEN if first.grad_norm is None else Reason.NONFINITE
            seen: dict[str, Any] = {"bad": len(bad), "steps": len(record.steps), "names": first.nonfinite_gradients}
            yield self.failed(reason, step=first.step, observed=first.grad_norm, limit=limit, **seen)
