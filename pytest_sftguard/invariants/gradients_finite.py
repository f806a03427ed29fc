"""B2: every gradient is finite, unscaled and before clipping."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard.records import RunRecord
from pytest_sftguard.verdicts import Finding, Invariant


@dataclass(frozen=True, kw_only=True)
class GradientsFinite(Invariant):
    """No step has a NaN or infinite gradient, but for one that the loss scaler skipped, backing off."""

    code: ClassVar[str] = "B2"

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Look at the unscaled, unclipped gradients of every step."""
        if all(s.grad_norm is None for s in record.steps):
            yield self.not_evaluated("no gradient was seen")
            return
        bad = [s for s in record.steps if not s.gradients_finite and s.effect != "skipped_by_scaler"]
        if bad:
            first = bad[0]
            tensors = f" in {first.nonfinite_gradients}" if first.nonfinite_gradients else ""
            what = "was not seen" if first.grad_norm is None else "is not finite"
            yield self.failed(
                f"grad_norm {what} at {len(bad)} of {len(record.steps)} steps (first: step {first.step}{tensors})",
                step=first.step, observed=first.grad_norm, limit="finite, or skipped by the loss scaler",
            )  # fmt: skip
