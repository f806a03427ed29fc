"""D6: answers come to an end, once the losses say that the end is learned."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from pytest_sftguard import verdicts
from pytest_sftguard.records import AnswerRecord, Learning, RunRecord
from pytest_sftguard.records.learning import MIN_STEPS
from pytest_sftguard.verdicts import Finding, Invariant

_UNTRAINED = "not trained far enough to have learned where an answer ends"


class Reason(verdicts.Reason):
    """Whether answers end, and whether that can be asked for."""

    NO_ANSWER = "no answer was generated"
    TOO_SHORT = f"{_UNTRAINED}: fewer than {{least:# step}}"
    NOT_LEARNED = (
        f"{_UNTRAINED}: loss {{loss:.3g}} per token, {{nats_per_answer:.3g}} per answer, {{first_loss:.3g}} at first"
    )
    NO_END_TOKEN = "generation knows no end token"
    ENDLESS = "{ended} of {answers:# answer} came to an end ({prompt!r} was answered {text!r})"
    NEVER_TAUGHT = f"{ENDLESS}; no row teaches the end token"


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
            yield self.not_evaluated(Reason.NO_ANSWER)
            return
        learning = Learning.of(record)
        if learning is None:
            yield self.not_evaluated(Reason.TOO_SHORT, least=MIN_STEPS)
        elif not learning.claimed(self.max_nats_per_answer, self.max_loss_share):
            yield self.not_evaluated(Reason.NOT_LEARNED, **learning.claim)
        elif any(a.stopped is None for a in record.answers):
            yield self.not_evaluated(Reason.NO_END_TOKEN)
        else:
            yield from self._ends(record)

    def _ends(self, record: RunRecord) -> Iterator[Finding]:
        base = record.base_answers
        taught = None if base is None or base.ends_taught is None else base.ends_taught > 0
        ended = sum(_ended(a, taught) for a in record.answers)
        fraction = ended / len(record.answers)
        if not fraction >= self.min_stopped_fraction:
            going = next(a for a in record.answers if not _ended(a, taught))
            reason = Reason.NEVER_TAUGHT if taught is False else Reason.ENDLESS
            seen: dict[str, Any] = {"ended": ended, "answers": len(record.answers)}
            seen |= {"prompt": going.prompt[-60:], "text": going.text[:60]}
            yield self.failed(reason, observed=fraction, limit=self.min_stopped_fraction, **seen)


def _ended(answer: AnswerRecord, taught: bool | None) -> bool:
    """Whether generation stopped; or, where rows may teach no end, the target found the number nevertheless."""
    return bool(answer.stopped) or (taught is not True and answer.is_number)
