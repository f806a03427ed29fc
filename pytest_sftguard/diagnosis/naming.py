"""Naming: the mechanisms that a case has clues for, the most probable first."""

from __future__ import annotations

from dataclasses import dataclass

from pytest_sftguard.diagnosis.case import Case, Clue
from pytest_sftguard.diagnosis.mechanism import Mechanism
from pytest_sftguard.diagnosis.mechanisms import MECHANISMS
from pytest_sftguard.verdicts import Finding, JudgedRun, Outcome


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
    """The mechanisms that `run` has clues for, the most probable first; empty for a run that is not in doubt.

    A mechanism is worth the sum of its clues; where two are worth the same, the earlier one of the table goes first.
    """
    case = Case(run.record, run.verdict, run.references)
    if run.record.not_run is not None or run.verdict.outcome is Outcome.PASSED:
        return []
    found = [(m, m.look(case)) for m in MECHANISMS]
    worth = [(sum(c.weight for c in clues), m, clues) for m, clues in found if any(c.weight > 0 for c in clues)]
    worth = [item for item in worth if item[0] > 0]
    return [_named(m, clues) for _, m, clues in sorted(worth, key=lambda item: -item[0])]


def _named(mechanism: Mechanism, clues: list[Clue]) -> Diagnosis:
    return Diagnosis(
        mechanism=mechanism.name,
        summary=mechanism.summary,
        evidence=tuple(c.text for c in sorted(clues, key=lambda c: -c.weight) if c.weight > 0),
        against=tuple(c.text for c in clues if c.weight < 0),
        cure=mechanism.cure,
    )
