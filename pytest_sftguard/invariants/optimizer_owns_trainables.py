"""A2: the optimizer steps what is to be trained, each tensor once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard.records import RunRecord
from pytest_sftguard.verdicts import Finding, Invariant


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
            yield self.not_evaluated("no optimizer was seen")
            return
        if not record.adapter:
            yield self.failed("there is no trainable tensor to own", observed=0, limit="at least 1")
        for what, names in (
            ("trainable tensors are not in the optimizer, and will never move", optimizer.lacking),
            ("tensors in the optimizer began to take a gradient during the training", optimizer.foreign),
            ("tensors are in the optimizer more than once", optimizer.twice),
        ):
            if names:
                yield self.failed(f"{names.count} {what}: {names}", observed=names.count, limit=0)
        explained = optimizer.lacking or optimizer.foreign or optimizer.idle >= 1
        if not (optimizer.owns_trainables or explained):
            yield self.failed("the optimizer's parameters are not the trainable ones")
