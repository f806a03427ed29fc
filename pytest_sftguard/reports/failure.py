"""The message of a failed cell: what, where, by how much, on what, why, and what to run next."""

from __future__ import annotations

import math
import textwrap

from pytest_sftguard.diagnosis import diagnose
from pytest_sftguard.invariants import told_last
from pytest_sftguard.rendering import told
from pytest_sftguard.verdicts import Finding, JudgedRun

_WIDTH = 116


def message(run: JudgedRun, rerun: str) -> str:
    """All failed findings of `run` in the order of their steps, the probable mechanism, the command to repeat it.

    Of a run without failures: why it was not evaluated.
    """
    if not run.verdict.failures:
        return _not_evaluated(run)
    record, last = run.record, told_last()
    failures = sorted(run.verdict.failures, key=lambda f: (math.inf if f.step is None else f.step, f.invariant in last))
    invariants = dict.fromkeys(f.invariant for f in failures)
    lines = [
        f"{record.cell} FAILED: {', '.join(invariants)}",
        _row("device", f"{record.device}, torch {record.versions.get('torch', '?')}"),
        _row("target", record.target + (f" with model {record.model}" if record.model else "")),
    ]
    lines += [_row("" if f.step is None else f"step {f.step}", _described(f)) for f in failures]
    # a record from elsewhere has no test to run again
    again = [_row("rerun", rerun, wrap=False)] if rerun else []
    return "\n".join([*lines, *_cause(run), *again])


def _not_evaluated(run: JudgedRun) -> str:
    """Why the cell was not evaluated, as one sentence."""
    reasons = [told(f) for f in run.verdict.not_evaluated if f.required] or ["nothing in it could be judged"]
    return f"{run.record.cell} not evaluated: {'; '.join(reasons)}"


def _described(finding: Finding) -> str:
    """One finding: the invariant that does not hold, what was seen, and what is allowed."""
    numbers = []
    if finding.observed is not None:
        numbers.append(f"observed {finding.observed:.6g}")
    if finding.limit is not None:
        numbers.append(f"allowed {finding.limit if isinstance(finding.limit, str) else format(finding.limit, '.6g')}")
    return f"{finding.invariant}: {told(finding)}" + (f" [{', '.join(numbers)}]" if numbers else "")


def _cause(run: JudgedRun) -> list[str]:
    found = diagnose(run)
    if not found:
        return []
    first, *others = found
    lines = [_row("cause", f"{first.mechanism}: {first.summary}")]
    lines += [_row("evidence", told(e)) for e in first.evidence]
    lines += [_row("against", told(a)) for a in first.against]
    lines.append(_row("cure", first.cure))
    if others:
        lines.append(_row("or else", ", ".join(d.mechanism for d in others)))
    return lines


def _row(label: str, value: str, wrap: bool = True) -> str:
    line = f"  {label:<9} {value}"
    if not wrap:
        return line
    return textwrap.fill(
        line, _WIDTH, subsequent_indent=" " * 12, break_long_words=False, break_on_hyphens=False, drop_whitespace=True
    )
