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
from pytest_sftguard.records import Names, RunRecord
from pytest_sftguard.records.encoding import encode


class Outcome(enum.Enum):
    """What is known: that it holds, that it does not, or nothing."""

    PASSED = "passed"
    FAILED = "failed"
    NOT_EVALUATED = "not evaluated"


class Reason(enum.Enum):
    """Why an invariant says what it says: one member for each thing that it can say.

    The name is the reason's code. The value is the sentence that `rendering` makes of the finding's evidence.
    """

    @property
    def code(self) -> str:
        """The reason in reports and JSON, such as `no_step`."""
        return self.name.lower()

    @property
    def invariant(self) -> str:
        """The invariant whose reason this is: the enum stands in the invariant's file."""
        return type(self).__module__.rpartition(".")[2]


class General(Reason):
    """Reasons that any invariant may have."""

    NO_STEP = "no optimizer step was seen"
    NO_GRADIENT = "no gradient was seen"
    NO_OPTIMIZER = "no optimizer was seen"
    NO_TRAINABLE = "the model has no trainable tensor"
    OUT_OF_REACH = "the run broke off, and its trainable tensors were out of reach afterwards"
    NOT_ASKED = "not asked for: the look or reference `{name}`"
    INAPPLICABLE = "{why}"
    LOOK_BROKE = "the guard's own look `{name}` ended in {error}"
    GUARD_BROKE = "the guard's own code ended in {error}[[ ({where})]], which says nothing about the training"
    LOOK_EMPTY = "the look `{name}` left nothing to judge by"
    REFERENCE_NOT_RUN = "the {name} reference was not run: {why}"
    REFERENCE_BROKE = "the {name} reference {cell} ended in {error}"
    CELL_NOT_RUN = "{not_run}"
    BROKEN = "the invariant itself is broken: {error}"
    UNUSABLE = "the invariant cannot be used: {why}"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one invariant says of one record."""

    invariant: str
    """Name of the invariant, a statement that should be true."""
    outcome: Outcome
    """Whether it holds."""
    reason: str = ""
    """Code of the reason; empty where the invariant gives its message alone."""
    message: str = ""
    """What was seen, as a sentence whose `{fields}` are the evidence. Only `rendering` reads it."""
    evidence: Mapping[str, Any] = field(default_factory=dict)
    """What was seen, by name: numbers, texts, tuples of them, `Names` of tensors."""
    step: int | None = None
    """Optimizer step at which it was seen first, from 1."""
    observed: float | None = None
    """The value that was seen."""
    limit: float | str | None = None
    """What is allowed."""
    required: bool = True
    """Whether the cell cannot pass while this is not evaluated."""
    waived: bool = False
    """Whether the user has accepted it: it failed, and counts as not evaluated."""

    def because(self, *reasons: Reason) -> bool:
        """Whether one of `reasons`, members of the invariant's own enum or of `General`, is why it says so."""
        return any(self.reason == r.code and self.message == r.value for r in reasons)

    def mentions(self, text: str) -> bool:
        """Whether the evidence names something, such as a tensor, whose name holds `text`."""
        named = [n for v in self.evidence.values() for n in (v.first if isinstance(v, Names) else [v])]
        return any(isinstance(n, str) and text in n for n in named)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types; `from_dict` takes it back."""
        values = {f.name: encode(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return values | {"outcome": self.outcome.name}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Finding:
        """Read what `to_dict` wrote."""
        read = {name: _read(data[name]) for name in ("observed", "limit")}
        read["evidence"] = {name: _read(value) for name, value in data["evidence"].items()}
        return cls(**{**data, **read, "outcome": Outcome[data["outcome"]]})

    @property
    def doubts(self) -> bool:
        """Whether this keeps the cell from passing: it failed, or had to be evaluated and could not be."""
        return self.outcome is Outcome.FAILED or (self.outcome is Outcome.NOT_EVALUATED and self.required)

    @property
    def guards_own(self) -> bool:
        """Whether an exception in the guard's own look or reference run kept it from being evaluated."""
        return self.because(General.LOOK_BROKE, General.GUARD_BROKE, General.REFERENCE_BROKE, General.BROKEN)


def _read(value: Any) -> Any:
    """A piece of evidence out of what `encode` made of it."""
    if isinstance(value, dict):
        return Names(value["count"], tuple(value["first"]))
    if isinstance(value, list):
        return tuple(map(_read, value))
    return float(value) if value in ("nan", "inf", "-inf") else value


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
        self,
        reason: Reason | str,
        *,
        step: int | None = None,
        observed: float | None = None,
        limit: float | str | None = None,
        **evidence: Any,
    ) -> Finding:
        """A finding that the statement is false, for `reason`, with the evidence that its sentence names."""
        numbers = {"step": step, "observed": observed, "limit": limit, "required": self.required}
        return self._finding(Outcome.FAILED, reason, evidence, **numbers)

    def forbid(self, reason: Reason, names: Names, **evidence: Any) -> Iterator[Finding]:
        """A failure for `reason` that counts and names `names`; nothing where there are none, as it must be."""
        if names:
            yield self.failed(reason, observed=names.count, limit=0, names=names, **evidence)

    def not_evaluated(self, reason: Reason | str, *, required: bool | None = None, **evidence: Any) -> Finding:
        """A finding that the record holds nothing to decide by."""
        needed = self.required if required is None else required
        return self._finding(Outcome.NOT_EVALUATED, reason, evidence, required=needed)

    def _finding(self, outcome: Outcome, reason: Reason | str, evidence: dict[str, Any], **fields: Any) -> Finding:
        code, message = (reason.code, str(reason.value)) if isinstance(reason, Reason) else ("", reason)
        return Finding(invariant=self.name, outcome=outcome, reason=code, message=message, evidence=evidence, **fields)

    def not_looked(self, record: RunRecord, name: str) -> Finding:
        """The finding where the extra look `name` left nothing to decide by: not asked for, inapplicable, or broken."""
        look = record.look(name)
        if look is None:
            return self.not_evaluated(General.NOT_ASKED, name=name, required=False)
        if look.inapplicable:
            return self.not_evaluated(General.INAPPLICABLE, why=look.inapplicable, required=False)
        if look.error:
            return self.not_evaluated(General.LOOK_BROKE, name=name, error=look.error, required=False)
        return self.not_evaluated(General.LOOK_EMPTY, name=name, required=True)

    def not_compared(self, reference: RunRecord | None) -> Finding | None:
        """The finding where there is no other run to compare with, or where it did not come to its end; else None."""
        name = self.reference
        if reference is None:
            return self.not_evaluated(General.NOT_ASKED, name=name, required=False)
        if reference.not_run is not None:
            return self.not_evaluated(General.REFERENCE_NOT_RUN, name=name, why=reference.not_run, required=False)
        if reference.error is not None:
            error = str(reference.error)
            return self.not_evaluated(
                General.REFERENCE_BROKE, name=name, cell=reference.cell, error=error, required=False
            )
        return None


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
        """Findings of the invariant with this name."""
        return tuple(f for f in self.findings if f.invariant == invariant)


def judge(
    record: RunRecord,
    invariants: Sequence[Checks],
    references: Mapping[str, RunRecord] | None = None,
    waived: Iterable[str] = (),
    *,
    strict: bool = False,
) -> Verdict:
    """Hold `record` against `invariants`, and against the one of `references` that an invariant compares with.

    A finding of an invariant named in `waived` that would have failed is *not evaluated* instead, and marked as waived.

    An invariant that raises, or yields something that is no finding, is *not evaluated* under its own name. The others
    are judged all the same. If `strict`, what the guard itself failed to look at keeps the cell from passing.
    """
    if record.not_run is not None:
        return Verdict(
            (general_finding("cell_ran", Outcome.NOT_EVALUATED, General.CELL_NOT_RUN, not_run=record.not_run),)
        )
    found = [f for invariant in invariants for f in _findings(invariant, record, references or {})]
    names = set(waived)
    if strict:
        found = [dataclasses.replace(f, required=f.required or f.guards_own) for f in found]
    return Verdict(tuple(_waived(f) if f.invariant in names and f.outcome is Outcome.FAILED else f for f in found))


def _waived(finding: Finding) -> Finding:
    return dataclasses.replace(finding, outcome=Outcome.NOT_EVALUATED, waived=True, required=False)


def general_finding(invariant: str, outcome: Outcome, reason: General, **evidence: Any) -> Finding:
    """A finding for a general `reason`, under the name of an invariant that is none of ours."""
    return Finding(invariant=invariant, outcome=outcome, reason=reason.code, message=reason.value, evidence=evidence)


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
    # an outsider's invariant may raise anything, pytest's Skipped too; the others are judged all the same
    except BaseException as error:
        text = f"{type(error).__name__}: {error}"
        return [*found, general_finding(name, Outcome.NOT_EVALUATED, General.BROKEN, error=text)]
    left_out = record.observed and any(getattr(record, field) is None for field in getattr(invariant, "asks_for", ()))
    if left_out:
        found = [f if f.outcome is Outcome.FAILED else dataclasses.replace(f, required=False) for f in found]
    return found or [Finding(invariant=name, outcome=Outcome.PASSED)]


def _hold_to_types(finding: Any) -> None:
    """Raise TypeError where an outsider's finding is none, or holds what no report could print."""
    if not isinstance(finding, Finding):
        raise TypeError(f"it yielded {finding!r}, which is no Finding")
    wanted: dict[str, type | tuple[type, ...]] = {
        "invariant": str,
        "outcome": Outcome,
        "reason": str,
        "message": str,
        "evidence": Mapping,
        "step": (int, NoneType),
        "observed": (int, float, NoneType),
        "limit": (int, float, str, NoneType),
    }
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
