"""Findings and verdicts: what an invariant says of a record, and what all of them together mean for the cell."""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, ClassVar, Protocol, cast

from pytest_sftguard.benchmarking import hand_over
from pytest_sftguard.records import RunRecord


class Outcome(enum.Enum):
    """What is known: that it holds, that it does not, or nothing."""

    PASSED = "passed"
    FAILED = "failed"
    NOT_EVALUATED = "not evaluated"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one invariant says of one record."""

    invariant: str
    """Name of the invariant, a statement that should be true."""
    outcome: Outcome
    """Whether it holds."""
    message: str = ""
    """What was seen, in one line."""
    step: int | None = None
    """Optimizer step at which it was seen first, from 1."""
    observed: float | None = None
    """The value that was seen."""
    limit: float | str | None = None
    """What is allowed."""
    required: bool = True
    """Whether the cell cannot pass while this is not evaluated."""

    @property
    def doubts(self) -> bool:
        """Whether this keeps the cell from passing: it failed, or had to be evaluated and could not be."""
        return self.outcome is Outcome.FAILED or (self.outcome is Outcome.NOT_EVALUATED and self.required)


class Checks(Protocol):
    """What judging needs of an invariant; any object with a `check` will do."""

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Yield what is wrong, or what could not be looked at; nothing where all is well."""


class Invariant:
    """Base of our invariants: their name, their code, and the making of findings.

    A subclass is a frozen dataclass whose fields are its thresholds. An invariant must say `not_evaluated` itself
    where the record holds nothing that it could look at: a `check` that yields nothing passes.
    """

    code: ClassVar[str] = ""
    """Code in the catalogue of failures, such as B7."""
    required: ClassVar[bool] = True
    """Whether a cell cannot pass while this is not evaluated."""
    reference: ClassVar[str | None] = None
    """Kind of the other run that `check` is given beside the record, one of `tiers.REFERENCES`."""
    asks_for: ClassVar[tuple[str, ...]] = ()
    """Fields of the record without which a loop of the user's own passes all the same: nobody asked for them there."""

    @property
    def name(self) -> str:
        """The statement: the class name in snake case."""
        return invariant_name(self)

    def failed(
        self, message: str, *, step: int | None = None, observed: float | None = None, limit: float | str | None = None
    ) -> Finding:
        """A finding that the statement is false."""
        return Finding(
            invariant=self.name, outcome=Outcome.FAILED, message=message,
            step=step, observed=observed, limit=limit, required=self.required,
        )  # fmt: skip

    def not_evaluated(self, message: str, *, required: bool | None = None) -> Finding:
        """A finding that the record holds nothing to decide by."""
        needed = self.required if required is None else required
        return Finding(invariant=self.name, outcome=Outcome.NOT_EVALUATED, message=message, required=needed)

    def not_looked(self, record: RunRecord, name: str) -> Finding:
        """The finding where the extra look `name` left nothing to decide by: not asked for, inapplicable, or broken."""
        look = record.look(name)
        if look is None:
            return self.not_evaluated(f"{UNASKED} `{name}`", required=False)
        if look.inapplicable:
            return self.not_evaluated(look.inapplicable, required=False)
        if look.error:
            return self.failed(f"the look `{name}` ended in {look.error}")
        return self.not_evaluated(f"the look `{name}` left nothing to judge by", required=True)

    def not_compared(self, reference: RunRecord | None) -> Finding | None:
        """The finding where there is no other run to compare with, or where it did not come to its end; else None."""
        if reference is None:
            return self.not_evaluated(f"{UNASKED} `{self.reference}`", required=False)
        if reference.not_run is not None:
            return self.not_evaluated(
                f"its {self.reference} reference was not run: {reference.not_run}", required=False
            )
        if reference.error is not None:
            error = reference.error
            return self.failed(
                f"its {self.reference} reference {reference.cell} ended in {error.type}: {error.message}"
            )
        return None


UNASKED = "not asked for: the look or reference"
"""How the message begins of what was not evaluated because a higher tier would look at it."""


def invariant_name(invariant: object) -> str:
    """Name of any invariant, an outsider's too."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", type(invariant).__name__).lower()


@dataclass(frozen=True)
class Verdict:
    """All findings on one record, one for each invariant at least."""

    findings: tuple[Finding, ...]
    """In the order of the invariants."""

    @property
    def outcome(self) -> Outcome:
        """FAILED if anything failed; else NOT_EVALUATED if anything required, or everything, was not evaluated."""
        if self.failures:
            return Outcome.FAILED
        passed = any(f.outcome is Outcome.PASSED for f in self.findings)
        missing = any(f.outcome is not Outcome.PASSED and f.required for f in self.findings)
        return Outcome.PASSED if passed and not missing else Outcome.NOT_EVALUATED

    @property
    def passed(self) -> bool:
        """Whether the cell is sound, and was looked at."""
        return self.outcome is Outcome.PASSED

    @property
    def failures(self) -> tuple[Finding, ...]:
        """The findings that failed."""
        return tuple(f for f in self.findings if f.outcome is Outcome.FAILED)

    @property
    def not_evaluated(self) -> tuple[Finding, ...]:
        """The findings that say that nothing could be decided."""
        return tuple(f for f in self.findings if f.outcome is Outcome.NOT_EVALUATED)

    def of(self, invariant: str) -> tuple[Finding, ...]:
        """The findings of the invariant called so."""
        return tuple(f for f in self.findings if f.invariant == invariant)


def judge(
    record: RunRecord,
    invariants: Sequence[Checks],
    references: Mapping[str, RunRecord] | None = None,
    waived: Iterable[str] = (),
) -> Verdict:
    """Hold `record` against `invariants`, and against the one of `references` that an invariant compares with.

    What an invariant named in `waived` would have failed is *not evaluated* instead, in so many words.

    An invariant that raises, or yields something that is no finding, has failed itself: that is reported as a
    failure under its name, and the others are judged all the same.
    """
    if record.not_run is not None:
        return Verdict((Finding(invariant="cell_ran", outcome=Outcome.NOT_EVALUATED, message=record.not_run),))
    found = [f for invariant in invariants for f in _findings(invariant, record, references or {})]
    names = set(waived)
    return Verdict(tuple(_waived(f) if f.invariant in names and f.outcome is Outcome.FAILED else f for f in found))


def _waived(finding: Finding) -> Finding:
    message = f"waived by the user: {finding.message}"
    return dataclasses.replace(finding, outcome=Outcome.NOT_EVALUATED, message=message, required=False)


def _findings(invariant: Checks, record: RunRecord, references: Mapping[str, RunRecord]) -> list[Finding]:
    name = invariant_name(invariant)
    reference = references.get(getattr(invariant, "reference", None) or "")
    found: list[Finding] = []
    try:
        for finding in cast("Iterable[Any]", invariant.check(record, reference)):
            _hold_to_types(finding)
            found.append(finding)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # an outsider's may raise anything, pytest's Skipped too; the rest is judged
        broken = f"the invariant itself is broken: {type(error).__name__}: {error}"
        return [*found, Finding(invariant=name, outcome=Outcome.FAILED, message=broken)]
    left_out = record.observed and any(getattr(record, field) is None for field in getattr(invariant, "asks_for", ()))
    if left_out:
        found = [f if f.outcome is Outcome.FAILED else dataclasses.replace(f, required=False) for f in found]
    return found or [Finding(invariant=name, outcome=Outcome.PASSED)]


def _hold_to_types(finding: Any) -> None:
    """Raise TypeError where an outsider's finding is none, or holds what no report could print."""
    if not isinstance(finding, Finding):
        raise TypeError(f"it yielded {finding!r}, which is no Finding")
    wanted: dict[str, type | tuple[type, ...]] = {
        "invariant": str, "outcome": Outcome, "message": str, "step": (int, NoneType),
        "observed": (int, float, NoneType), "limit": (int, float, str, NoneType),
    }  # fmt: skip
    for name, types in wanted.items():
        if not isinstance(getattr(finding, name), types):
            raise TypeError(f"it yielded a Finding with {name}={getattr(finding, name)!r}")


@dataclass(frozen=True)
class JudgedRun:
    """A training run and the verdict on it: what the fixture `sft_run` gives to a test."""

    record: RunRecord
    """Everything that was seen."""
    verdict: Verdict
    """What it means."""
    references: Mapping[str, RunRecord] = field(default_factory=dict)
    """The other runs that it was compared with, by their kind."""

    @property
    def losses(self) -> list[float]:
        """Raw loss of every optimizer step."""
        return self.record.losses

    @property
    def grad_norms(self) -> list[float]:
        """Unclipped gradient norm of every optimizer step."""
        return self.record.grad_norms

    @property
    def step_seconds(self) -> list[float]:
        """Wall time of every optimizer step, the guard's own looks included, in seconds."""
        return [step.seconds for step in self.record.steps if step.seconds is not None]

    def benchmark_steps(self, benchmark: Any, *, warm_up: int = 1) -> None:
        """Hand the step times to pytest-benchmark's fixture `benchmark`, which then compares and keeps them.

        The first `warm_up` steps are left out: the first one makes the optimizer's states. Raises ValueError where no
        step is left.
        """
        hand_over(benchmark, self.step_seconds[warm_up:])
