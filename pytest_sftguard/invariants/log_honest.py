"""B13: nothing was laundered between the source and what is shown, or stepped with."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from pytest_sftguard import verdicts
from pytest_sftguard.records import LogRecord, RunRecord, StepRecord
from pytest_sftguard.verdicts import Finding, Invariant

_LOGGED = "the Trainer logged loss {observed:.6g} at step {line}, where "


class Reason(verdicts.Reason):
    """What was laundered, or logged otherwise than it was."""

    NOT_LOGGED = "the Trainer logged no loss"
    LAUNDERED_GRADIENTS = (
        "laundered: the gradients of step {step} were not finite[[ in {names}]], and the optimizer was given gradients"
        " of norm {observed:.6g}"
    )
    LAUNDERED_LOSS = "laundered: " + _LOGGED + "the loss of[[ micro-batch {micro_batch} of]] step {step} was {loss}"
    ZEROED_GRADIENTS = "the gradients of step {step} had the norm {limit:.6g}, and the optimizer was given zeros"
    OTHER_LOSS = _LOGGED + "the loss was {limit:.6g}"
    OTHER_MEAN = _LOGGED + "the mean of {steps:# step} was {limit:.6g}"


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
            yield self.not_evaluated(Reason.NOT_LOGGED)
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
            nonfinite_before = nonfinite_before or any(_nonfinite(s) for s in covered)

    def _gradients(self, record: RunRecord) -> Iterator[Finding]:
        for s in record.taken_steps:
            norm, given = s.grad_norm, s.received_grad_norm
            if norm is None or given is None:
                continue
            if not s.gradients_finite and math.isfinite(given):
                names, reason = s.nonfinite_gradients, Reason.LAUNDERED_GRADIENTS
                yield self.failed(reason, step=s.step, observed=given, limit=norm, names=names)
                return
            if norm > 0 and given == 0:
                yield self.failed(Reason.ZEROED_GRADIENTS, step=s.step, observed=0.0, limit=norm)
                return

    def _line(self, line: LogRecord, covered: list[StepRecord], nonfinite_before: bool) -> Finding | None:
        """What is wrong with a line of the log that sums up the steps `covered`."""
        logged = math.nan if line.loss is None else line.loss
        bad = next(filter(_nonfinite, covered), None)
        if bad is not None:
            # honest; that the loss is not finite is for raw_loss_finite to say
            if not math.isfinite(logged):
                return None
            seen, limit = _nonfinite(bad), "what was seen at the source"
            return self.failed(
                Reason.LAUNDERED_LOSS, step=bad.step, observed=logged, limit=limit, line=line.step, **seen
            )
        mean = math.fsum(s.loss for s in covered if s.loss is not None) / len(covered)
        # without the filter, NaN stays in the Trainer's running sum for ever
        if not math.isfinite(logged) and nonfinite_before:
            return None
        if abs(logged - mean) <= self.rtol * abs(mean) + self.atol:
            return None
        reason, steps = Reason.OTHER_MEAN if len(covered) > 1 else Reason.OTHER_LOSS, len(covered)
        return self.failed(reason, step=line.step, observed=logged, limit=mean, line=line.step, steps=steps)


def _nonfinite(step: StepRecord) -> dict[str, Any]:
    """The loss of `step` that is not finite, and its micro-batch where it is one of those; empty where all are."""
    for i, loss in enumerate(step.micro_losses, 1):
        if not math.isfinite(loss):
            return {"micro_batch": i, "loss": loss}
    return {} if step.loss is None or math.isfinite(step.loss) else {"loss": step.loss}
