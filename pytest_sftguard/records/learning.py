"""What the losses of a run claim: that the answers are learned, or that the training diverged."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pytest_sftguard.records.run import RunRecord

MIN_STEPS = 16
"""Fewest steps for a claim: a quarter of them is four, more than one lucky batch."""
MAX_ANSWER_TOKENS = 120
"""Most supervised tokens of a row for which an answer is generated completely."""


@dataclass(frozen=True, kw_only=True)
class Learning:
    """The course of a run's raw losses per supervised token, as the training summed them."""

    first: float
    """Loss of the first step: that of the base, if the adapter starts as zero."""
    last: float
    """Mean loss of the last quarter of the steps."""
    peak: float
    """Largest mean loss of four steps in a row."""
    tokens: float
    """Average number of supervised tokens in a row."""

    @classmethod
    def of(cls, record: RunRecord) -> Learning | None:
        """Return the course of `record`; None if it is too short, or lacks a step's loss or supervised tokens."""
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
            # the last step of an epoch has fewer rows
            tokens=max(counts) / rows,
        )

    @property
    def nats_per_answer(self) -> float:
        """Loss of a complete answer, the sum over its tokens, in nats."""
        return self.last * self.tokens

    @property
    def promised(self) -> float:
        """Share of the trained rows that greedy decoding must get right, according to the losses.

        If an answer costs less than ln 2, each of its tokens has a probability above one half, so that greedy decoding
        generates it, with its end. By Markov's inequality at most nats / ln 2 of all rows cost more.
        """
        return 1 - self.nats_per_answer / math.log(2)

    def claimed(self, max_nats: float, max_share: float) -> bool:
        """Whether the losses say that the answers are learned: few nats per answer, a small share of the first loss."""
        return (
            self.nats_per_answer <= max_nats
            and self.last <= max_share * self.first
            and self.tokens <= MAX_ANSWER_TOKENS
        )

    @property
    def claim(self) -> dict[str, Any]:
        """The numbers that the claim rests on, as evidence of a finding."""
        return {"loss": self.last, "nats_per_answer": self.nats_per_answer, "first_loss": self.first}
