"""A8: generation is given what the rows of the training begin with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard.records import RunRecord
from pytest_sftguard.verdicts import Finding, Invariant


@dataclass(frozen=True, kw_only=True)
class PromptIsPrefix(Invariant):
    """The tokens that generation is given are those that the row begins with, up to its first label at least.

    Where none of the questions is in the training rows, the prompts of both begin and end alike.
    """

    code: ClassVar[str] = "A8"

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Look at the rows that were compared."""
        seen = record.prompts
        if seen is None:
            yield self.not_looked(record, "prompts")
            return
        if not (seen.matched >= 1 or seen.forms >= 1):
            yield self.not_evaluated(
                "none of the questions is in the rows of the training, and neither their prompts nor those of the rows"
                " have an end in common",
                required=False,
            )
        for what, count, of in (
            ("rows do not begin with the tokens that generation is given for their question", seen.deviating, "rows"),
            ("rows have more before their first label than generation is given", seen.short, "rows"),
            ("ends of the prompts are others in training than in generation", seen.strange_forms, "forms"),
        ):
            total = seen.matched if of == "rows" else seen.forms
            if count != 0:
                yield self.failed(f"{count} of {total} {what}: {seen.example}", observed=count, limit=0)
