"""The message of a failed cell: what, where, by how much, on what, why, and what to run next."""

from __future__ import annotations

import re

from pytest_sftguard.diagnosis import diagnose
from pytest_sftguard.rendering import told
from pytest_sftguard.reports._headline import by_step, headline
from pytest_sftguard.reports._screen import Screen
from pytest_sftguard.verdicts import Finding, JudgedRun

_INDENT = " " * 12
_WORD = re.compile(r"""(?:"[^"]*"|'[^']*'|\S)+""")
"""A word of a shell's command, with its quotes."""


def message(run: JudgedRun, rerun: str, screen: Screen) -> str:
    """All failed findings of `run` in the order of their steps, the probable mechanism, the command to repeat it.

    Of a run without failures: why it was not evaluated.
    """
    if not run.verdict.failures:
        return "\n".join(screen.wrap(headline(run)))
    record, failures = run.record, by_step(run)
    rows = [
        ("device", f"{record.device}, torch {record.versions.get('torch', '?')}"),
        ("target", record.target + (f" with model {record.model}" if record.model else "")),
        *(("" if f.step is None else f"step {f.step}", _described(f)) for f in failures),
        *_cause(run),
    ]
    invariants = ", ".join(dict.fromkeys(f.invariant for f in failures))
    lines = screen.wrap(f"{record.cell} FAILED: {invariants}", _INDENT)
    for label, value in rows:
        lines += screen.wrap(f"  {label:<9} {value}", _INDENT)
    # a record from elsewhere has no test to run again
    if rerun:
        lines += _command(rerun, screen.width)
    return "\n".join(lines)


def _described(finding: Finding) -> str:
    """One finding: the invariant that does not hold, what was seen, and what is allowed."""
    numbers = []
    if finding.observed is not None:
        numbers.append(f"observed {finding.observed:.6g}")
    if finding.limit is not None:
        numbers.append(f"allowed {finding.limit if isinstance(finding.limit, str) else format(finding.limit, '.6g')}")
    return f"{finding.invariant}: {told(finding)}" + (f" [{', '.join(numbers)}]" if numbers else "")


def _cause(run: JudgedRun) -> list[tuple[str, str]]:
    found = diagnose(run)
    if not found:
        return []
    first, *others = found
    return [
        ("cause", f"{first.mechanism}: {first.summary}"),
        *(("evidence", told(e)) for e in first.evidence),
        *(("against", told(a)) for a in first.against),
        ("cure", first.cure),
        *([("or else", ", ".join(d.mechanism for d in others))] if others else []),
    ]


def _command(command: str, width: int) -> list[str]:
    """The command in lines that a shell joins again; no word of it is broken."""
    lines = ["  rerun    "]
    for word in _WORD.findall(command):
        if len(f"{lines[-1]} {word} \\") > width and lines[-1].strip() != "rerun":
            lines[-1] += " \\"
            lines.append(_INDENT[:-1])
        lines[-1] += f" {word}"
    return lines
