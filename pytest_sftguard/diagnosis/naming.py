"""Naming: the mechanisms that a case has evidence for, the best first; none where the evidence is too little."""

from __future__ import annotations

from dataclasses import dataclass

from pytest_sftguard.diagnosis.case import Case, Clue
from pytest_sftguard.diagnosis.mechanism import Mechanism
from pytest_sftguard.diagnosis.mechanisms import MECHANISMS
from pytest_sftguard.verdicts import Finding, JudgedRun, Outcome

THRESHOLD = 8
"""Least evidence for a name, the sum of the clues that discriminate: one that is decisive, or two signs that do not
follow from each other. Each clue against takes a sign away. People act on a name, so that a wrong one is worse than
none."""


@dataclass(frozen=True)
class Diagnosis:
    """A named mechanism, and why it is thought to be the one."""

    mechanism: str
    """Name of the mechanism, an entry of the table."""
    summary: str
    """What happens, in one sentence."""
    evidence: tuple[str | Finding, ...]
    """What speaks for it: sentences, and findings that `rendering` makes sentences of."""
    against: tuple[str | Finding, ...]
    """What speaks against it."""
    cure: str
    """The change that removes it."""


def diagnose(run: JudgedRun) -> list[Diagnosis]:
    """The mechanisms that `run` has evidence for, the best first; empty for a run that is not in doubt.

    A mechanism is worth the sum of its clues; where two are worth the same, the earlier one of the table goes first.
    Those that only locate the fault are named where no other one is.
    """
    if run.record.not_run is not None or run.verdict.outcome is Outcome.PASSED:
        return []
    case = Case(run.record, run.verdict, run.references)
    found = [(m, clues) for m in MECHANISMS if is_enough(clues := m.look(case))]
    specific = [(m, clues) for m, clues in found if not m.locates]
    return [_named(m, clues) for m, clues in sorted(specific or found, key=lambda item: -_worth(item[1]))]


def is_enough(clues: list[Clue]) -> bool:
    """Whether these clues are evidence enough to name a mechanism."""
    return sum(c.weight for c in clues if c.discriminates) >= THRESHOLD


def _worth(clues: list[Clue]) -> int:
    return sum(c.weight for c in clues)


def _named(mechanism: Mechanism, clues: list[Clue]) -> Diagnosis:
    return Diagnosis(
        mechanism=mechanism.name,
        summary=mechanism.summary,
        evidence=tuple(c.text for c in sorted(clues, key=lambda c: -c.weight) if c.weight > 0),
        against=tuple(c.text for c in clues if c.weight < 0),
        cure=mechanism.cure,
    )
