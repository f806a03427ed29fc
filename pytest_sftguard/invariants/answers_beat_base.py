"""D5: the adapter answers better than its base does, once its losses say that it has learned."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard.records import AnswerRecord, BaseAnswersRecord, Learning, RunRecord
from pytest_sftguard.records.learning import MIN_STEPS
from pytest_sftguard.verdicts import Finding, Invariant


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
            yield self.not_evaluated(
                f"{len(record.answers)} answers of the adapter and {len(base.answers)} of its base cannot be compared",
                required=True,
            )
            return
        won, lost = self._compared(record.answers, base.answers)
        if not lost - won <= self.max_sigmas * math.sqrt(won + lost):
            yield self.failed(
                f"the adapter unlearned what its base can: {self._counts(record, base)}",
                observed=lost - won, limit=self.max_sigmas * math.sqrt(won + lost),
            )  # fmt: skip
            return
        learning = Learning.of(record)
        if learning is not None:
            broken = self._promise(record, base, learning) or self._collapse(record, base, learning, won - lost)
            if broken:
                yield broken
                return
        if not won > lost and not self._kept(record, base, learning):
            seen = f"fewer than {MIN_STEPS} steps" if learning is None else str(learning)
            yield self.not_evaluated(f"not trained far enough to tell: {seen}; {self._counts(record, base)}")

    def _compared(self, ours: tuple[AnswerRecord, ...], base: tuple[AnswerRecord, ...]) -> tuple[int, int]:
        pairs = [(a.is_right(self.rtol), b.is_right(self.rtol)) for a, b in zip(ours, base, strict=True)]
        return sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)

    def _right(self, answers: tuple[AnswerRecord, ...]) -> int:
        return sum(a.is_right(self.rtol) for a in answers)

    def _counts(self, record: RunRecord, base: BaseAnswersRecord) -> str:
        asked = len(record.answers)
        return f"{self._right(record.answers)} of {asked} answers are right, of the base's {self._right(base.answers)}"

    def _due(self, record: RunRecord, base: BaseAnswersRecord, learning: Learning) -> float:
        """Answers that must be right by what the losses promise; 0 where they promise nothing."""
        if not learning.claimed(self.max_nats_per_answer, self.max_loss_share):
            return 0.0
        asked = len(record.answers)
        known = asked if _rows_are_fresh(record) else min(base.taught, asked)
        return self.min_kept_promise * learning.promised * known

    def _kept(self, record: RunRecord, base: BaseAnswersRecord, learning: Learning | None) -> bool:
        due = 0.0 if learning is None else self._due(record, base, learning)
        return due > 0 and self._right(record.answers) >= due

    def _promise(self, record: RunRecord, base: BaseAnswersRecord, learning: Learning) -> Finding | None:
        due, right = self._due(record, base, learning), self._right(record.answers)
        if right >= due:
            return None
        wrong = next(a for a in record.answers if not a.is_right(self.rtol))
        return self.failed(
            f"the losses say that the answers are learned ({learning}), and {self._counts(record, base)}"
            f" ({wrong.prompt[-60:]!r} was answered {wrong.text[:60]!r})",
            observed=right, limit=due,
        )  # fmt: skip

    def _collapse(self, record: RunRecord, base: BaseAnswersRecord, learning: Learning, gained: int) -> Finding | None:
        expected = len({a.expected for a in record.answers})
        given = len({a.text for a in record.answers})
        start = max(learning.first, base.loss or 0.0)
        if learning.peak <= self.max_rise * start or expected < 2 or gained > max(1, self._noise(expected)):
            return None
        if given >= self.min_distinct * expected and learning.last <= start:
            return None
        return self.failed(
            f"the training blew up and collapsed: the loss rose to {learning.peak:.3g} from {start:.3g}, ended"
            f" at {learning.last:.3g}, and {given} distinct answers are given where {expected} are expected;"
            f" {self._counts(record, base)}",
            observed=given, limit=self.min_distinct * expected,
        )  # fmt: skip

    def _noise(self, expected: int) -> float:
        """Answers that one and the same text has right by chance, at the most."""
        return self.min_distinct * expected


def _rows_are_fresh(record: RunRecord) -> bool:
    """Whether each row was trained on once, so that losses speak of questions that are in no row too."""
    epoch = record.micro_batches_per_epoch
    return epoch is not None and sum(len(s.micro_losses) for s in record.steps) <= epoch
