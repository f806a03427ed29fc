"""The message of a failed cell: what, where, by how much, on what, why, and what to run next."""

from __future__ import annotations

import re

from pytest_sftguard.diagnosis import NEVER_MEANT, certain, diagnose
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
        *_accepting(failures, "--sftguard-waive=NAME, or waive= in the marker" if rerun else "--waive NAME"),
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
        return [("cause", "no known mechanism fits"), *_certain(run)]
    first, *others = found
    return [
        ("cause", f"{first.mechanism}: {first.summary}"),
        *(("evidence", told(e)) for e in first.evidence),
        *(("against", told(a)) for a in first.against),
        ("cure", first.cure),
        *([("or else", ", ".join(d.mechanism for d in others))] if others else []),
    ]


def _certain(run: JudgedRun) -> list[tuple[str, str]]:
    """What is certain where no mechanism is named: where it begins, and what that rules out."""
    error, known = run.record.error, certain(run)
    if error is not None and error.stage in ("build", "train"):
        who = "code of the guard's own" if error.guards_own else "the code under test"
        return [("certain", f"{who} raised {error}" + (f" in {error.where}" if error.where else ""))]
    if known is None or known.station is None:
        return []
    at = "" if known.first.step is None else f" at step {known.first.step}"
    rows = [("certain", f"the first that deviates is {known.station.value}{at}: {told(known.first)}")]
    if known.sound and not known.unseen and not known.failed:
        rows.append(
            ("ruled out", f"all that comes before it, up to {known.sound[-1].value}, as far as it was looked at")
        )
    elif known.sound:
        rows.append(("ruled out", f"{_listed([s.value for s in known.sound])}, as far as they were looked at"))
    if known.unseen:
        rows.append(("open", f"nothing looked at {_listed([s.value for s in known.unseen])}"))
    return rows


def _listed(names: list[str]) -> str:
    *others, last = names
    return f"{', '.join(others)}, and {last}" if others else last


def _accepting(failures: list[Finding], how: str) -> list[tuple[str, str]]:
    """How to accept findings that may be meant, or that only a library can mend: `how`, with the invariant's name."""
    names = list(dict.fromkeys(f.invariant for f in failures if f.invariant not in NEVER_MEANT))
    if not names:
        return []
    if len(names) == 1:
        return [("if meant", f"accept it with {how.replace('NAME', names[0])}")]
    return [("if meant", f"accept an invariant with {how}")]


def _command(command: str, width: int) -> list[str]:
    """The command in lines that a shell joins again; no word of it is broken."""
    lines = ["  rerun    "]
    for word in _WORD.findall(command):
        if len(f"{lines[-1]} {word} \\") > width and lines[-1].strip() != "rerun":
            lines[-1] += " \\"
            lines.append(_INDENT[:-1])
        lines[-1] += f" {word}"
    return lines
