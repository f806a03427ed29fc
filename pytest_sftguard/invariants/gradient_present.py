"""B3: every trainable tensor that is used gets a gradient, and one that is not zero."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard.invariants._due import Due, is_factor, without_tensors
from pytest_sftguard.records import Names, RunRecord, StepRecord
from pytest_sftguard.verdicts import Finding, Invariant


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
        steps = [s for s in record.steps if s.grad_norm is not None and s.effect != "skipped_by_scaler"]
        if not steps:
            skipped = any(s.effect == "skipped_by_scaler" for s in record.steps)
            why = "the loss scaler skipped every step" if skipped else "no gradient was seen"
            yield self.not_evaluated(why)
            return
        if nothing := without_tensors(self, record):
            yield nothing
            return
        due = Due(record)
        never = {t.name for t in record.adapter}
        missing: tuple[StepRecord, list[str]] | None = None
        zero: tuple[StepRecord, list[str]] | None = None
        for s in steps:
            absent = [n for n in s.missing_gradients.first if is_factor(n) and n not in s.idle.first]
            # a layer may be given nothing to learn, and not all of them at once
            empty = [*s.zero_gradients.first] if _all_zero(record, s) else due.among(s.zero_gradients.first, s)
            missing = missing or ((s, absent) if absent else None)
            zero = zero or ((s, empty) if empty else None)
            never &= {*s.missing_gradients.first, *s.zero_gradients.first}
            if s.effect == "applied":
                due.effective(s)
        if missing:
            yield self._at("has no gradient", *missing)
        if zero:
            yield self._at("has a gradient of exactly zero", *zero)
        told = {n for found in (missing, zero) if found for n in found[1]}
        never &= {t.name for t in due.over_the_run()} - told
        if never:
            yield self.failed(
                f"{Names.of(sorted(never))} had no gradient other than zero at any of {len(steps)} steps",
                observed=len(never), limit="a gradient at some step",
            )  # fmt: skip

    def _at(self, what: str, step: StepRecord, names: list[str]) -> Finding:
        return self.failed(
            f"at step {step.step} {Names.of(names)} {what}",
            step=step.step, observed=len(names), limit="a gradient for every factor that is used",
        )  # fmt: skip


def _all_zero(record: RunRecord, step: StepRecord) -> bool:
    """Whether every gradient that there is at `step` is exactly zero."""
    without = step.zero_gradients.count + step.missing_gradients.count
    return step.zero_gradients.count > 0 and without >= len(record.adapter)
