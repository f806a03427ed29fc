"""What the losses of a run claim, in one place: that the answers are learned, or that the training blew up."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pytest_sftguard.records.run import RunRecord

MIN_STEPS = 16
"""Steps from which on losses claim anything: a quarter of them is four, more than one lucky batch."""
MAX_ANSWER_TOKENS = 120
"""Supervised tokens of a row up to which an answer is generated whole."""


@dataclass(frozen=True, kw_only=True)
class Learning:
    """The course of a run's raw losses, per supervised token, as the training added them up."""

    first: float
    """Loss of the first step: the base's own, where the adapter starts as nothing."""
    last: float
    """Mean loss of the last quarter of the steps."""
    peak: float
    """Largest mean loss of four steps in a row."""
    tokens: float
    """Supervised tokens of a row, on average."""

    @classmethod
    def of(cls, record: RunRecord) -> Learning | None:
        """The course of `record`; None where it is too short, or where losses or supervised tokens were not seen."""
        losses = [s.loss for s in record.steps if s.loss is not None]
        counts = [s.supervised_tokens for s in record.steps if s.supervised_tokens]
        if len(losses) < max(MIN_STEPS, len(record.steps)) or len(counts) < len(losses):
            return None
        rows = record.per_device_train_batch_size * record.gradient_accumulation_steps
        quarter = losses[-(len(losses) // 4) :]
        windows = [math.fsum(losses[i : i + 4]) / 4 for i in range(len(losses) - 3)]
        return cls(
            first=losses[0],
            last=math.fsum(quarter) / len(quarter),
            peak=max(windows),
            tokens=max(counts) / rows,  # the last step of an epoch has fewer rows
        )

    @property
    def nats_per_answer(self) -> float:
        """Loss of a whole answer, in nats: what its tokens cost together."""
        return self.last * self.tokens

    @property
    def promised(self) -> float:
        """Share of the trained rows that greedy decoding must get right, by the losses.

        A row whose answer costs less than ln 2 has each token at more than one half, so that greedy decoding gives it,
        the end included; by Markov's inequality the others are at most nats / ln 2 of all.
        """
        return 1 - self.nats_per_answer / math.log(2)

    def claimed(self, max_nats: float, max_share: float) -> bool:
        """Whether the losses say that the answers are learned: few nats for each, a small share of the first loss."""
        return (
            self.nats_per_answer <= max_nats
            and self.last <= max_share * self.first
            and self.tokens <= MAX_ANSWER_TOKENS
        )

    @property
    def claim(self) -> dict[str, Any]:
        """The numbers that the claim rests on, as evidence of a finding."""
        return {"loss": self.last, "nats_per_answer": self.nats_per_answer, "first_loss": self.first}
