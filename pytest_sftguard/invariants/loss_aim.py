"""A14: the loss makes the labels more likely."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard import verdicts
from pytest_sftguard.records import RunRecord
from pytest_sftguard.verdicts import Finding, General, Invariant


class Reason(verdicts.Reason):
    """Where the loss aims instead."""

    NEGATED = (
        "the loss makes the labels less likely: its gradient at the {at} points away from cross-entropy's (cosine"
        " {observed:.3g}; {against} of {places:# place})"
    )
    ELSEWHERE = (
        "the loss does not aim at the labels: the cosine of its gradient at the {at} with cross-entropy's is"
        " {observed:.3g} ({against} of {places:# place} against it)"
    )
    NOT_COMPARED = "the gradient was compared with cross-entropy's at no place"


@dataclass(frozen=True, kw_only=True)
class LossAim(Invariant):
    """The gradient at places with a label points where cross-entropy's points, which makes their label more likely.

    Places whose label is already likely are not asked, because label smoothing rightly makes it less so.
    """

    min_cosine: float = 0.6
    """Smallest cosine of the two gradients: the mean of all places, or of all together, whichever is larger. Measured
    0.93 to 1 in healthy trainings (weights, focal, label smoothing), 0.77 with an unlikelihood term on purpose; 0.1
    and less for labels of other rows, other tokens or a uniform target; -1 for a negated loss."""

    code: ClassVar[str] = "A14"

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Look at the cosine."""
        if (seen := record.aim) is None:
            yield self.not_looked(record, "first_batch")
            return
        if seen.error:
            yield self.not_evaluated(General.LOOK_BROKE, name="first_batch", error=seen.error, required=False)
            return
        if seen.left_out:
            yield self.not_evaluated(General.INAPPLICABLE, why=seen.left_out, required=False)
            return
        if seen.cosine is None or seen.joint_cosine is None or not seen.places:
            yield self.not_evaluated(Reason.NOT_COMPARED)
            return
        both = (seen.cosine, seen.joint_cosine)
        cosine = max(both) if all(map(math.isfinite, both)) else math.nan
        if not cosine >= self.min_cosine:
            # half of the places against it is a mixture, more than nine in ten are a sign
            reason = Reason.NEGATED if seen.against > 0.9 * seen.places else Reason.ELSEWHERE
            yield self.failed(
                reason, observed=cosine, limit=self.min_cosine, at=seen.at, against=seen.against, places=seen.places
            )
