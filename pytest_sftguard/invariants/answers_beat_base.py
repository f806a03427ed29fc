"""D5: the adapter answers better than its base does, once its losses say that it has learned."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from pytest_sftguard import verdicts
from pytest_sftguard.records import AnswerRecord, BaseAnswersRecord, Learning, RunRecord
from pytest_sftguard.records.learning import MIN_STEPS
from pytest_sftguard.verdicts import Finding, Invariant

_COUNTS = "the adapter has {right} of {answers:# answer} right, its base {base_right}"
_LOSSES = "loss {loss:.3g} per token, {nats_per_answer:.3g} per answer, {first_loss:.3g} at first"


class Reason(verdicts.Reason):
    """What the answers say of what the losses claim."""

    NO_PAIRS = "{answers:# answer} of the adapter and {base_answers} of its base cannot be compared"
    UNLEARNED = f"the adapter unlearned what its base can: {_COUNTS}"
    PROMISE_BROKEN = (
        f"the losses say that the answers are learned ({_LOSSES}), and {_COUNTS} ({{prompt!r}} was answered {{text!r}})"
    )
    COLLAPSED = (
        "the training blew up and collapsed: the loss rose to {peak:.3g} from {start:.3g}, ended at {loss:.3g}, and"
        f" only {{observed:# distinct answer}} came where {{expected}} are expected; {_COUNTS}"
    )
    TOO_SHORT = f"not trained far enough to tell: fewer than {{least:# step}}; {_COUNTS}"
    NOT_LEARNED = f"not trained far enough to tell: {_LOSSES}; {_COUNTS}"


@dataclass(frozen=True, kw_only=True)
class AnswersBeatBase(Invariant):
    """What the losses claim is seen in the answers, and no answer of the base is lost.

    A training that is too short to have learned is not judged by its answers: losses claim to have learned where a
    whole answer costs next to nothing. Then greedy decoding must give most of the trained rows' answers, by arithmetic.
    """

    max_nats_per_answer: float = 0.2
    """Loss of a whole answer at the end up to which the answers count as learned: 71 % of the trained rows at least
    are then right (1 - 0.2 / ln 2). Measured on sums: 0.01 after 100 steps, 0.2 after 30."""
    max_loss_share: float = 0.25
    """Share of the first loss that is left then, so that a loss in other units claims nothing. Measured: 0.001."""
    min_kept_promise: float = 0.5
    """Share of the answers that the losses promise which must be right. The promise is for the trained rows."""
    rtol: float = 0.01
    """How far from the expected number an answer may be to count as right; four significant digits round to 5e-4."""
    max_sigmas: float = 2.0
    """How many answers more than the base's the adapter may lose, in standard deviations of a coin toss about each
    answer that only one of them has right: five lost and none won is too much, four may be chance."""
    max_rise: float = 1.5
    """Largest mean loss of four steps in a row, relative to the base's, before the training counts as blown up; the
    base's is that of the first step or of the first rows, whichever is more, as a single row may be an easy one.
    Measured on sums: 1.0 at sound learning rates, 1.4 at six times the best, 7 at twenty times, 170 at a hundred."""
    min_distinct: float = 0.25
    """Share of distinct answers, of the distinct expected ones, below which a training that blew up has collapsed.
    Measured: 0.07 to 0.14 of collapsed ones, 0.5 and more of those that recover."""

    code: ClassVar[str] = "D5"
    required: ClassVar[bool] = False

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Compare the two models' answers, question by question."""
        base = record.base_answers
        if base is None:
            yield self.not_looked(record, "base_answers")
            return
        if not record.answers or len(base.answers) != len(record.answers):
            counts = {"answers": len(record.answers), "base_answers": len(base.answers)}
            yield self.not_evaluated(Reason.NO_PAIRS, required=True, **counts)
            return
        won, lost = self._compared(record.answers, base.answers)
        limit = self.max_sigmas * math.sqrt(won + lost)
        if not lost - won <= limit:
            yield self.failed(Reason.UNLEARNED, observed=lost - won, limit=limit, **self._counts(record, base))
            return
        learning = Learning.of(record)
        if learning is None:
            if not won > lost:
                yield self.not_evaluated(Reason.TOO_SHORT, least=MIN_STEPS, **self._counts(record, base))
        elif broken := self._promise(record, base, learning) or self._collapse(record, base, learning, won - lost):
            yield broken
        elif not won > lost and not self._due(record, base, learning) > 0:
            yield self.not_evaluated(Reason.NOT_LEARNED, **learning.claim, **self._counts(record, base))

    def _compared(self, ours: tuple[AnswerRecord, ...], base: tuple[AnswerRecord, ...]) -> tuple[int, int]:
        pairs = [(a.is_right(self.rtol), b.is_right(self.rtol)) for a, b in zip(ours, base, strict=True)]
        return sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)

    def _right(self, answers: tuple[AnswerRecord, ...]) -> int:
        return sum(a.is_right(self.rtol) for a in answers)

    def _counts(self, record: RunRecord, base: BaseAnswersRecord) -> dict[str, Any]:
        right, base_right = self._right(record.answers), self._right(base.answers)
        return {"answers": len(record.answers), "right": right, "base_right": base_right}

    def _due(self, record: RunRecord, base: BaseAnswersRecord, learning: Learning) -> float:
        """Answers that must be right by what the losses promise; 0 where they promise nothing."""
        if not learning.claimed(self.max_nats_per_answer, self.max_loss_share):
            return 0.0
        asked = len(record.answers)
        known = asked if _rows_are_fresh(record) else min(base.taught, asked)
        return self.min_kept_promise * learning.promised * known

    def _promise(self, record: RunRecord, base: BaseAnswersRecord, learning: Learning) -> Finding | None:
        due, right = self._due(record, base, learning), self._right(record.answers)
        if right >= due:
            return None
        wrong = next(a for a in record.answers if not a.is_right(self.rtol))
        seen = {"prompt": wrong.prompt[-60:], "text": wrong.text[:60], **learning.claim, **self._counts(record, base)}
        return self.failed(Reason.PROMISE_BROKEN, observed=right, limit=due, **seen)

    def _collapse(self, record: RunRecord, base: BaseAnswersRecord, learning: Learning, gained: int) -> Finding | None:
        expected = len({a.expected for a in record.answers})
        given = len({a.text for a in record.answers})
        start = max(learning.first, base.loss or 0.0)
        # as many answers, at the most, does one and the same text have right by chance
        limit = self.min_distinct * expected
        if learning.peak <= self.max_rise * start or expected < 2 or gained > max(1, limit):
            return None
        if given >= limit and learning.last <= start:
            return None
        seen = {"peak": learning.peak, "start": start, "expected": expected, **learning.claim}
        return self.failed(Reason.COLLAPSED, observed=given, limit=limit, **seen, **self._counts(record, base))


def _rows_are_fresh(record: RunRecord) -> bool:
    """Whether each row was trained on once, so that losses speak of questions that are in no row too."""
    epoch = record.micro_batches_per_epoch
    return epoch is not None and sum(len(s.micro_losses) for s in record.steps) <= epoch
