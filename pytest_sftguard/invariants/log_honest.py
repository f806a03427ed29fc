"""B13: nothing was laundered between the source and what is shown, or stepped with."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard.records import LogRecord, RunRecord, StepRecord
from pytest_sftguard.verdicts import Finding, Invariant


@dataclass(frozen=True, kw_only=True)
class LogHonest(Invariant):
    """The logged loss is the mean of what was seen at the source, and the optimizer got the gradients that there were.

    A loss or gradient that is not finite, and that a filter, `nan_to_num` or a callback turned into something that
    looks sound, is laundered. That `logging_nan_inf_filter` is on is no failure; that it had something to hide is.
    """

    rtol: float = 1e-3
    """Largest relative difference of the logged loss: the same float32 numbers, added in another order."""
    atol: float = 6e-5
    """Largest absolute difference: some versions round the log to four decimals."""

    code: ClassVar[str] = "B13"
    required: ClassVar[bool] = False

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Look at each step's gradients before and after, and at each line of the log."""
        yield from self._gradients(record)
        lines = [line for line in record.log if line.loss is not None and line.learning_rate is not None]
        if not lines:
            yield self.not_evaluated("the Trainer logged no loss")
            return
        before = 0
        nonfinite_before = False
        for line in lines:
            covered = [s for s in record.steps if before < s.step <= line.step]
            whole = bool(covered) and len(covered) == line.step - before and all(s.loss is not None for s in covered)
            before = max(before, line.step)
            # what was not seen is for evidence_complete to say
            finding = self._line(line, covered, nonfinite_before) if whole else None
            if finding is not None:
                yield finding
                return
            nonfinite_before = nonfinite_before or any(_nonfinite(s) is not None for s in covered)

    def _gradients(self, record: RunRecord) -> Iterator[Finding]:
        for s in record.steps:
            if s.grad_norm is None or s.received_grad_norm is None or s.effect == "skipped_by_scaler":
                continue
            if not s.gradients_finite and math.isfinite(s.received_grad_norm):
                tensors = f" in {s.nonfinite_gradients}" if s.nonfinite_gradients else ""
                yield self.failed(
                    f"laundered: the gradients of step {s.step} were not finite{tensors}, and the optimizer was given"
                    f" some of norm {s.received_grad_norm:.6g}",
                    step=s.step, observed=s.received_grad_norm, limit=s.grad_norm,
                )  # fmt: skip
                return
            if s.grad_norm > 0 and s.received_grad_norm == 0:
                yield self.failed(
                    f"the gradients of step {s.step} had the norm {s.grad_norm:.6g}, and the optimizer was given zeros",
                    step=s.step, observed=0.0, limit=s.grad_norm,
                )  # fmt: skip
                return

    def _line(self, line: LogRecord, covered: list[StepRecord], nonfinite_before: bool) -> Finding | None:
        """What is wrong with a line of the log that sums up the steps `covered`."""
        logged = math.nan if line.loss is None else line.loss
        bad = next((s for s in covered if _nonfinite(s) is not None), None)
        if bad is not None:
            if not math.isfinite(logged):
                return None  # honest; that the loss is not finite is for raw_loss_finite to say
            return self.failed(
                f"laundered: the Trainer logged loss {logged:.6g} at step {line.step}, where {_nonfinite(bad)}",
                step=bad.step, observed=logged, limit="what was seen at the source",
            )  # fmt: skip
        mean = math.fsum(s.loss for s in covered if s.loss is not None) / len(covered)
        if not math.isfinite(logged) and nonfinite_before:
            return None  # without the filter, NaN stays in the Trainer's running sum for ever
        if abs(logged - mean) <= self.rtol * abs(mean) + self.atol:
            return None
        over = f"the mean of {len(covered)} steps" if len(covered) > 1 else "the loss"
        return self.failed(
            f"the Trainer logged loss {logged:.6g} at step {line.step}, where {over} was {mean:.6g}",
            step=line.step, observed=logged, limit=mean,
        )  # fmt: skip


def _nonfinite(step: StepRecord) -> str | None:
    """Which loss of `step` is not finite, in words; None where all are."""
    for i, loss in enumerate(step.micro_losses, 1):
        if not math.isfinite(loss):
            return f"micro-batch {i} of step {step.step} was {loss}"
    if step.loss is not None and not math.isfinite(step.loss):
        return f"the sum of step {step.step} was {step.loss}"
    return None
