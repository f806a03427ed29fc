"""A15: no token sees a later one, or another row."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard import verdicts
from pytest_sftguard.records import RunRecord
from pytest_sftguard.verdicts import Finding, General, Invariant


class Reason(verdicts.Reason):
    """What a token sees, and should not."""

    FUTURE = (
        "tokens see later ones: with one token changed, an earlier one differs by {observed:.3g} standard deviations"
        " ({where}), though the model is to predict each token from those before it"
    )
    ROWS = (
        "rows see each other: with a token of other rows changed, {where} differs by {observed:.3g} standard deviations"
    )
    NOT_COMPARED = "no token before a changed one was compared"


@dataclass(frozen=True, kw_only=True)
class NoFuture(Invariant):
    """In training, the last hidden state of a token stays if a later token of its row or any other row is changed.

    Asked of models whose labels are the tokens that they are given.
    """

    limit: float = 1e-3
    """Largest change, in standard deviations of the state. Measured 0 in nearly all healthy trainings and 2e-7 with
    experts; 0.04 where a layer adds a hundredth of the next token, 1.3 with one layer without a causal mask."""

    code: ClassVar[str] = "A15"

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Look at earlier tokens, then at the other rows."""
        if (seen := record.future) is None:
            yield self.not_looked(record, "first_batch")
            return
        if seen.error:
            yield self.not_evaluated(General.LOOK_BROKE, name="first_batch", error=seen.error, required=False)
            return
        if seen.left_out:
            yield self.not_evaluated(General.INAPPLICABLE, why=seen.left_out, required=False)
            return
        if not seen.tokens or seen.change is None or not 0 < seen.reached < math.inf:
            yield self.not_evaluated(Reason.NOT_COMPARED)
            return
        if not seen.change <= self.limit:
            yield self.failed(Reason.FUTURE, observed=seen.change, limit=self.limit, where=seen.where)
        elif seen.other_rows is not None and not seen.other_rows <= self.limit:
            yield self.failed(Reason.ROWS, observed=seen.other_rows, limit=self.limit, where=seen.other_row)
