"""A2: the optimizer steps what is to be trained, each tensor once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard import verdicts
from pytest_sftguard.records import RunRecord
from pytest_sftguard.verdicts import Finding, General, Invariant


class Reason(verdicts.Reason):
    """How the optimizer's parameters differ from the trainable ones."""

    LACKING = "the optimizer lacks {observed:# trainable tensor}, which will never move: {names}"
    FOREIGN = "{observed:# tensor} in the optimizer began to take a gradient during the training: {names}"
    TWICE = "the optimizer holds {observed:# tensor} more than once: {names}"
    OTHERS = "the optimizer's parameters are not the trainable ones"


@dataclass(frozen=True, kw_only=True)
class OptimizerOwnsTrainables(Invariant):
    """Every trainable tensor is in the optimizer, once, and no tensor of the model beside them that it could move.

    Frozen parameters may be there too: without a gradient they stay as they are.
    """

    code: ClassVar[str] = "A2"

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Compare the optimizer's parameters with the trainable ones, by identity."""
        optimizer = record.optimizer
        if optimizer is None or optimizer.owns_trainables is None:
            yield self.not_evaluated(General.NO_OPTIMIZER)
            return
        if not record.adapter:
            yield self.failed(General.NO_TRAINABLE, observed=0, limit="at least 1")
        yield from self.forbid(Reason.LACKING, optimizer.lacking)
        yield from self.forbid(Reason.FOREIGN, optimizer.foreign)
        yield from self.forbid(Reason.TWICE, optimizer.twice)
        explained = optimizer.lacking or optimizer.foreign or optimizer.idle >= 1
        if not (optimizer.owns_trainables or explained):
            yield self.failed(Reason.OTHERS)
