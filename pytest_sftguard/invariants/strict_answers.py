"""D4: the trained adapter, reloaded, answers with numbers, and they are read by a parser that makes none up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from pytest_sftguard import verdicts
from pytest_sftguard.records import ParserRecord, RunRecord
from pytest_sftguard.verdicts import Finding, Invariant


class Reason(verdicts.Reason):
    """What is wrong with the answers, or with the target's own `parse_answer`."""

    NO_ANSWER = "the target asks questions, and no answer was generated"
    NO_QUESTIONS = "the target offers no questions()"
    NO_NUMBERS = "{parsed} of {answers:# answer} could be read as a number ({prompt!r} was answered {text!r})"
    NOT_TRIED = "the target's parse_answer was not tried"
    JUNK = "parse_answer finds a number where there is no answer, in {observed} of {tried:# text}: {texts}"
    MISREAD = "parse_answer reads another number than is written, in {observed} of {tried:# text}: {texts}"
    RAISED = "parse_answer raises where it should give None, in {observed} of {tried:# text}: {texts}"


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
            asked = bool(record.questions)
            yield self.not_evaluated(Reason.NO_ANSWER if asked else Reason.NO_QUESTIONS, required=asked)
            return
        yield from self._parser(record.parser)
        parsed = [a for a in record.answers if a.is_number]
        fraction = len(parsed) / len(record.answers)
        if not fraction >= self.min_parsed_fraction:
            unparsed = next(a for a in record.answers if not a.is_number)
            seen: dict[str, Any] = {"parsed": len(parsed), "answers": len(record.answers)}
            seen |= {"prompt": unparsed.prompt[-60:], "text": unparsed.text[:60]}
            yield self.failed(Reason.NO_NUMBERS, observed=fraction, limit=self.min_parsed_fraction, **seen)

    def _parser(self, parser: ParserRecord | None) -> Iterator[Finding]:
        """Look at what the target's own parser made of texts without an answer."""
        if parser is None or not parser.tried >= 1:
            yield self.not_evaluated(Reason.NOT_TRIED, required=True)
            return
        for reason, names in (
            (Reason.JUNK, parser.junk),
            (Reason.MISREAD, parser.misread),
            (Reason.RAISED, parser.raised),
        ):
            if names:
                texts = names.first[:3]
                yield self.failed(reason, observed=names.count, limit=0, tried=parser.tried, texts=texts)
