"""D4: the trained adapter, reloaded, answers with numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard.records import RunRecord
from pytest_sftguard.verdicts import Finding, Invariant


@dataclass(frozen=True, kw_only=True)
class StrictAnswers(Invariant):
    """Enough of the generated answers parse, strictly, as a finite number."""

    min_parsed_fraction: float = 0.5
    """Share of the answers that must parse. A few steps of training teach the form of an answer only in part, so
    that this asks for most; a target that trains longer can ask for all."""

    code: ClassVar[str] = "D4"
    required: ClassVar[bool] = False

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Count what was parsed; nothing that did not parse counts as a number."""
        if not record.answers:
            if record.questions:
                yield self.not_evaluated("the target asks questions, and no answer was generated", required=True)
            else:
                yield self.not_evaluated("the target offers no questions()")
            return
        parsed = [a for a in record.answers if a.is_number]
        fraction = len(parsed) / len(record.answers)
        if not fraction >= self.min_parsed_fraction:
            unparsed = next(a for a in record.answers if not a.is_number)
            yield self.failed(
                f"{len(parsed)} of {len(record.answers)} answers hold a number"
                f" ({unparsed.prompt[-60:]!r} was answered {unparsed.text[:60]!r})",
                observed=fraction, limit=self.min_parsed_fraction,
            )  # fmt: skip
