"""A8: generation is given what the rows of the training begin with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard import verdicts
from pytest_sftguard.records import PromptsRecord, RunRecord
from pytest_sftguard.verdicts import Finding, Invariant


class Reason(verdicts.Reason):
    """How the prompts of generation differ from those of the training."""

    NOTHING_SHARED = "no row holds one of the questions, and prompts in training and generation have no end in common"
    SHIFTED = (
        "the ids of the rows are those of the questions {offset:+d}: they share {shifted:.0%} of {pairs:# pair} of"
        " neighbouring tokens if that is added, and {observed:.0%} as they are"
    )
    OTHER_TOKENIZER = (
        "the rows were not made with the tokenizer of the questions: they share none of {pairs:# pair} of neighbouring"
        " tokens, and {observed:.0%} of their ids come back when their text is read again ({questions:.0%} of the"
        " questions'); is a cache of tokens stale?"
    )
    DEVIATING = "{observed} of {total:# row} did not begin with the tokens that generation is given[[: {example}]]"
    SHORT = "{observed} of {total:# row} had more before their first label than generation is given[[: {example}]]"
    OTHER_FORM = "{observed} of {total:# prompt end} differed between training and generation[[: {example}]]"


@dataclass(frozen=True, kw_only=True)
class PromptIsPrefix(Invariant):
    """The tokens that generation is given are those that the row begins with, up to its first label at least.

    Where none of the questions is in the training rows, the prompts of both begin and end alike, and their ids are of
    one tokenizer.
    """

    min_shifted: float = 0.6
    """Smallest share of pairs of tokens that the rows hold once a number is added to the questions' ids, for the ids to
    count as shifted. With no number they must hold at most half of that. Measured 0.74 and more for shifted ids, 0.33
    and less for sound ones."""
    min_reread: float = 0.8
    """Smallest share of the rows' ids that come back when their text is read again, where no pair of tokens is shared.
    Measured 1.0 for a tokenizer's own ids, and 0.68 and less for another's."""

    code: ClassVar[str] = "A8"

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Look at the rows that were compared."""
        if (seen := record.prompts) is None:
            yield self.not_looked(record, "prompts")
            return
        yield from self._language(seen)
        if not (seen.matched >= 1 or seen.forms >= 1):
            yield self.not_evaluated(Reason.NOTHING_SHARED, required=False)
        for reason, count, total in (
            (Reason.DEVIATING, seen.deviating, seen.matched),
            (Reason.SHORT, seen.short, seen.matched),
            (Reason.OTHER_FORM, seen.strange_forms, seen.forms),
        ):
            if count != 0:
                yield self.failed(reason, observed=count, limit=0, total=total, example=seen.example)

    def _language(self, seen: PromptsRecord) -> Iterator[Finding]:
        shared, shifted = seen.shared_pairs, seen.offset_pairs
        if shared is not None and shifted is not None and shifted >= self.min_shifted and 2 * shared <= shifted:
            yield self.failed(Reason.SHIFTED, observed=shared, offset=seen.offset, shifted=shifted, pairs=seen.pairs)
            return
        rows, questions = seen.rows_reread, seen.questions_reread
        # a tokenizer that does not read its own text again tells nothing
        if (
            shared == 0
            and rows is not None
            and questions is not None
            and questions >= 0.9
            and not rows >= self.min_reread
        ):
            yield self.failed(
                Reason.OTHER_TOKENIZER, observed=rows, limit=self.min_reread, questions=questions, pairs=seen.pairs
            )
