"""D4: the trained adapter, reloaded, answers with numbers, and they are read by a parser that makes none up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard.records import ParserRecord, RunRecord
from pytest_sftguard.verdicts import Finding, Invariant


@dataclass(frozen=True, kw_only=True)
class StrictAnswers(Invariant):
    """Enough of the generated answers parse, strictly, as a finite number, by a parser that finds none in junk."""

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
        yield from self._parser(record.parser)
        parsed = [a for a in record.answers if a.is_number]
        fraction = len(parsed) / len(record.answers)
        if not fraction >= self.min_parsed_fraction:
            unparsed = next(a for a in record.answers if not a.is_number)
            yield self.failed(
                f"{len(parsed)} of {len(record.answers)} answers hold a number"
                f" ({unparsed.prompt[-60:]!r} was answered {unparsed.text[:60]!r})",
                observed=fraction, limit=self.min_parsed_fraction,
            )  # fmt: skip

    def _parser(self, parser: ParserRecord | None) -> Iterator[Finding]:
        """Look at what the target's own parser made of texts without an answer."""
        if parser is None or not parser.tried >= 1:
            yield self.not_evaluated("the target's parse_answer was not tried", required=True)
            return
        for what, names in (
            ("finds a number in texts that hold no answer", parser.junk),
            ("reads another number than is written", parser.misread),
            ("raises where it should say None", parser.raised),
        ):
            if names:
                yield self.failed(
                    f"parse_answer {what}, in {names.count} of {parser.tried} texts: {', '.join(names.first[:3])}",
                    observed=names.count, limit=0,
                )  # fmt: skip
