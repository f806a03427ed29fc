"""B3: every trainable tensor that is used gets a gradient, and one that is not zero."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard import verdicts
from pytest_sftguard.invariants._due import Due, is_factor, without_tensors
from pytest_sftguard.records import Names, RunRecord, StepRecord
from pytest_sftguard.verdicts import Finding, General, Invariant


class Reason(verdicts.Reason):
    """Which tensors went without a gradient, or why that cannot be told."""

    ALL_SKIPPED = "the loss scaler skipped every step"
    MISSING = "at step {step} {names} had no gradient"
    ZERO = "at step {step} {names} had a gradient of exactly zero"
    NEVER = "{names} had no gradient other than zero at any of {steps:# step}"


@dataclass(frozen=True, kw_only=True)
class GradientPresent(Invariant):
    """No factor that a token passed through lacks its gradient; it is not zero from the step on that it is due.

    A factor that starts at zero is due from the first step, every other from the second effective one. A tensor that is
    no factor, such as a bias, may go without for a step, and not for the whole run.
    """

    code: ClassVar[str] = "B3"

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Look at the gradients of each step that the loss scaler did not skip, and at all of them together."""
        # an overflow says nothing of what is missing, and another step takes its place
        steps = [s for s in record.taken_steps if s.grad_norm is not None]
        if not steps:
            skipped = any(s.skipped for s in record.steps)
            yield self.not_evaluated(Reason.ALL_SKIPPED if skipped else General.NO_GRADIENT)
            return
        if nothing := without_tensors(self, record):
            yield nothing
            return
        due = Due(record)
        never = {t.name for t in record.adapter}
        missing: tuple[int, list[str]] | None = None
        zero: tuple[int, list[str]] | None = None
        for s in steps:
            absent = [n for n in s.missing_gradients.first if is_factor(n) and n not in s.idle.first]
            # a layer may be given nothing to learn, and not all of them at once
            empty = [*s.zero_gradients.first] if _all_zero(record, s) else due.among(s.zero_gradients.first, s)
            empty = [] if s.tied else empty
            missing = missing or ((s.step, absent) if absent else None)
            zero = zero or ((s.step, empty) if empty else None)
            never &= {*s.missing_gradients.first, *s.zero_gradients.first}
            if s.effect == "applied":
                due.effective(s)
        limit = "a gradient for every factor that is used"
        for reason, found in ((Reason.MISSING, missing), (Reason.ZERO, zero)):
            if found:
                step, without = found
                never -= {*without}
                yield self.failed(reason, step=step, observed=len(without), limit=limit, names=Names.of(without))
        never &= {t.name for t in due.over_the_run()}
        if never:
            names, limit = Names.of(sorted(never)), "a gradient at some step"
            yield self.failed(Reason.NEVER, observed=names.count, limit=limit, steps=len(steps), names=names)


def _all_zero(record: RunRecord, step: StepRecord) -> bool:
    """Whether every gradient that there is at `step` is exactly zero."""
    without = step.zero_gradients.count + step.missing_gradients.count
    return step.zero_gradients.count > 0 and without >= len(record.adapter)
