"""D6: answers come to an end, once the losses say that the end is learned."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard.records import AnswerRecord, Learning, RunRecord
from pytest_sftguard.records.learning import MIN_STEPS
from pytest_sftguard.verdicts import Finding, Invariant


@dataclass(frozen=True, kw_only=True)
class Stops(Invariant):
    """Generation ends by itself within its budget; where no row teaches an end, the target finds the answer's end."""

    max_nats_per_answer: float = 0.2
    """As in `answers_beat_base`: the loss of a whole answer, its end included, up to which it counts as learned."""
    max_loss_share: float = 0.25
    """As in `answers_beat_base`: the share of the first loss that is left then."""
    min_stopped_fraction: float = 0.75
    """Share of the answers that must end. The losses promise 71 % of the trained rows and more, in practice all:
    16 of 16 sums after 100 steps. Measured: 0 where labels are shifted twice, or the end is masked with padding."""

    code: ClassVar[str] = "D6"
    required: ClassVar[bool] = False

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Count the answers that ended."""
        if not record.answers:
            yield self.not_evaluated("no answer was generated")
            return
        learning = Learning.of(record)
        if learning is None or not learning.claimed(self.max_nats_per_answer, self.max_loss_share):
            seen = f"fewer than {MIN_STEPS} steps" if learning is None else str(learning)
            yield self.not_evaluated(f"not trained far enough to have learned where an answer ends: {seen}")
            return
        if any(a.stopped is None for a in record.answers):
            yield self.not_evaluated("generation knows no end token")
            return
        base = record.base_answers
        taught = None if base is None or base.ends_taught is None else base.ends_taught > 0
        ended = sum(_ended(a, taught) for a in record.answers)
        fraction = ended / len(record.answers)
        if not fraction >= self.min_stopped_fraction:
            going = next(a for a in record.answers if not _ended(a, taught))
            why = "; no row teaches the end token" if taught is False else ""
            yield self.failed(
                f"{ended} of {len(record.answers)} answers end by themselves{why} ({going.prompt[-60:]!r} was answered"
                f" {going.text[:60]!r})",
                observed=fraction, limit=self.min_stopped_fraction,
            )  # fmt: skip


def _ended(answer: AnswerRecord, taught: bool | None) -> bool:
    """Whether generation stopped; or, where rows may teach no end, the target found the number nevertheless."""
    return bool(answer.stopped) or (taught is not True and answer.is_number)
