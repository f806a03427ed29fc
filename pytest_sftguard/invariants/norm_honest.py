"""B11: the grad_norm that the Trainer logs is the norm of the gradients, and the optimizer gets them clipped by it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard import verdicts
from pytest_sftguard.records import RunRecord
from pytest_sftguard.verdicts import Finding, Invariant


class Reason(verdicts.Reason):
    """Where norms differ that should be one, or were not seen."""

    NOT_SEEN = "what the optimizer was given at step {step} was not seen"
    GIVEN = (
        "the optimizer was given gradients of norm {observed:.6g} at step {step}, where the norm was {grad_norm:.6g}"
        " and max_grad_norm is {max_grad_norm}"
    )
    PARTED = (
        "the gradient of {tensor} that the optimizer was given at step {step} is not the one that backward left: they"
        " differ by {observed:.2g} of its norm, beyond the factor that all tensors have in common"
    )
    NOT_LOGGED = "the Trainer logged no grad_norm of a step that was taken"
    LOGGED = "the Trainer logged grad_norm {observed:.6g} at step {step}, where the gradients' norm was {limit:.6g}"


@dataclass(frozen=True, kw_only=True)
class NormHonest(Invariant):
    """The logged norm is the one seen at the source, and what the optimizer was given has it, or `max_grad_norm`.

    So nothing was scaled, clipped or cleaned in between but by the Trainer's own clipping, which scales all alike: each
    tensor's norm, and the sum of its elements under fixed random signs, have changed by one factor.
    """

    rtol: float = 1e-3
    """Largest relative difference: both are norms of the same gradients, summed in another order."""
    half_rtol: float = 2**-7
    """The same where trainable tensors are bfloat16 or float16: the Trainer's norm is then rounded to their type, for
    each tensor and once more for all of them, each time by 2**-9 at the most; measured up to 2.7e-3."""
    max_parting: float = 2e-5
    """Largest difference of a tensor's norm or signed sum, beyond the common factor, relative to its norm. Measured in
    220 healthy trainings: at most 6e-7."""
    half_max_parting: float = 2**-6
    """The same where trainable tensors are bfloat16 or float16, whose gradients are rounded again when they are
    clipped; measured: at most 4.7e-3."""

    code: ClassVar[str] = "B11"
    required: ClassVar[bool] = False

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Compare step by step, then line by line; what the loss scaler skipped may be anything."""
        half = any(t.dtype in ("bfloat16", "float16") for t in record.adapter)
        rtol = self.half_rtol if half else self.rtol
        given = list(self._given(record, rtol))
        yield from given or self._parted(record, self.half_max_parting if half else self.max_parting)
        yield from self._logged(record, rtol)

    def _given(self, record: RunRecord, rtol: float) -> Iterator[Finding]:
        for s in record.taken_steps:
            if s.grad_norm is None:
                continue
            given = s.received_grad_norm
            if given is None:
                yield self.not_evaluated(Reason.NOT_SEEN, required=True, step=s.step)
                return
            # that it is not finite is for gradients_finite to say; and where it was cleaned, for log_honest
            if not math.isfinite(s.grad_norm):
                continue
            # how a loop of the user's own clips is not known
            if record.observed and record.max_grad_norm is None:
                continue
            due = _clipped(s.grad_norm, record.max_grad_norm)
            if not abs(given - due) <= rtol * due:
                seen = {"grad_norm": s.grad_norm, "max_grad_norm": record.max_grad_norm}
                yield self.failed(Reason.GIVEN, step=s.step, observed=given, limit=due, **seen)
                return

    def _parted(self, record: RunRecord, limit: float) -> Iterator[Finding]:
        # how a loop of the user's own clips is not known
        if record.observed and record.max_grad_norm is None:
            return
        for s in record.taken_steps:
            if s.parting is not None and not s.parting <= limit:
                yield self.failed(Reason.PARTED, step=s.step, observed=s.parting, limit=limit, tensor=s.parting_tensor)
                return

    def _logged(self, record: RunRecord, rtol: float) -> Iterator[Finding]:
        norms = {s.step: math.nan if s.grad_norm is None else s.grad_norm for s in record.taken_steps}
        logged = [(n.step, n.grad_norm) for n in record.log if n.step in norms and n.grad_norm is not None]
        if not logged:
            yield self.not_evaluated(Reason.NOT_LOGGED)
            return
        for step, norm in logged:
            seen = norms[step]
            # where both are NaN the log is honest; that the gradients are NaN is for gradients_finite to say
            if seen == norm or (math.isnan(seen) and math.isnan(norm)):
                continue
            if not (math.isfinite(seen) and abs(norm - seen) <= rtol * abs(seen)):
                yield self.failed(Reason.LOGGED, step=step, observed=norm, limit=seen)
                return


def _clipped(norm: float, max_norm: float | None) -> float:
    """The norm after `clip_grad_norm_`, whose divisor is kept from zero by 1e-6."""
    return min(norm, norm * max_norm / (norm + 1e-6)) if max_norm else norm
