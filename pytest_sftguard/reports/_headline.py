"""Why a run did not pass, in a sentence, and its failures in the order in which they are told."""

from __future__ import annotations

import math

from pytest_sftguard.diagnosis import diagnose
from pytest_sftguard.invariants import told_last
from pytest_sftguard.rendering import told
from pytest_sftguard.verdicts import Finding, JudgedRun


def by_step(run: JudgedRun) -> list[Finding]:
    """The failures of `run`, the first step first; within a step, those that say least come last."""
    last = told_last()
    return sorted(run.verdict.failures, key=lambda f: (math.inf if f.step is None else f.step, f.invariant in last))


def headline(run: JudgedRun) -> str:
    """Why a run did not pass, as one sentence: its cause where there is evidence for one, or else the first finding."""
    if not run.verdict.failures:
        reasons = [told(f) for f in run.verdict.not_evaluated if f.required] or ["nothing in it could be judged"]
        return f"{run.record.cell} not evaluated: {'; '.join(reasons)}"
    for cause in diagnose(run):
        return f"{cause.mechanism}: {cause.summary}"
    first = by_step(run)[0]
    return f"{first.invariant}: {told(first)}"
