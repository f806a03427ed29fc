"""The text of a failed cell: what, where, by how much, on what, why, and what to run next."""

from __future__ import annotations

from pytest_sftguard.diagnosis import diagnose
from pytest_sftguard.verdicts import Finding, JudgedRun


def text(run: JudgedRun, rerun: str) -> str:
    """All failed findings of `run`, the most probable mechanism behind them, and the command that repeats the cell."""
    blocks = [block(finding, run, rerun) for finding in run.verdict.failures]
    return "\n\n".join([*blocks, *diagnosis(run)])


def block(finding: Finding, run: JudgedRun, rerun: str) -> str:
    """One finding in a few lines."""
    record = run.record
    lines = [
        f"{finding.invariant}: no -- {finding.message}",
        _row("cell", f"{record.cell}   device {record.device}"),
    ]
    if finding.step is not None or finding.observed is not None or finding.limit is not None:
        at = f"step {finding.step}" if finding.step is not None else "observed"
        seen = "" if finding.observed is None else f"{finding.observed:.6g}"
        allowed = "" if finding.limit is None else f"   allowed {_number(finding.limit)}"
        lines.append(_row(at, seen + allowed))
    lines.append(_row("rerun", rerun))
    return "\n".join(lines)


def diagnosis(run: JudgedRun) -> list[str]:
    """The most probable mechanism with its evidence, and the names of the others; nothing where none is known."""
    found = diagnose(run.record, run.verdict)
    if not found:
        return []
    first, *others = found
    lines = [f"probable cause: {first.mechanism} -- {first.summary}"]
    lines += [_row("evidence", e) for e in first.evidence]
    lines += [_row("against", a) for a in first.against]
    lines.append(_row("cure", first.cure))
    if others:
        lines.append(_row("also", ", ".join(d.mechanism for d in others)))
    return ["\n".join(lines)]


def not_evaluated(run: JudgedRun) -> str:
    """Why the cell was not evaluated, in one line."""
    reasons = [f.message for f in run.verdict.not_evaluated if f.required] or ["nothing in it could be judged"]
    return f"{run.record.cell} not evaluated: {'; '.join(reasons)}"


def _row(label: str, value: str) -> str:
    return f"  {label:<10} {value}".rstrip()


def _number(limit: float | str) -> str:
    return limit if isinstance(limit, str) else f"{limit:.6g}"
