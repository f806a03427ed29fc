"""B19: a token passes through every adapted layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard import verdicts
from pytest_sftguard.records import Names, RunRecord
from pytest_sftguard.verdicts import Finding, General, Invariant


class Reason(verdicts.Reason):
    """Which layers no token reached, or why that cannot be told."""

    UNREACHED = (
        "no token passed through {observed} of {total:# adapted layer} in any of {steps:# step}, so that its adapter"
        " learns nothing: {names}"
    )
    DROPPED = "no token passed through {names}, in a model that leaves out layers at random"


@dataclass(frozen=True, kw_only=True)
class AdapterReached(Invariant):
    """In some step a token passes through each adapted layer, or its factors get a gradient.

    A layer that is never called learns nothing: one whose weight a fused loss reads past it, one of a vision tower that
    no image reaches. A routed expert may rest, where there is a router and others of its choices were used.
    """

    code: ClassVar[str] = "B19"

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Look at the layers that were never called."""
        seen = record.reach
        if seen is None:
            yield self.not_looked(record, "reach")
            return
        steps = record.taken_steps
        if not steps:
            yield self.not_evaluated(General.NO_STEP)
            return
        # a fused kernel may read the factors without calling their layer
        dead = {t.name for t in record.adapter}
        for s in steps:
            dead &= {*s.missing_gradients.first, *s.zero_gradients.first}
        alive = [t.name for t in record.adapter if t.name not in dead]
        names = Names.of(n for n in seen.unreached.first if not any(a.startswith(f"{n}.") for a in alive))
        if names and seen.dropped_layers:
            yield self.not_evaluated(Reason.DROPPED, required=False, names=names)
        elif names:
            total = seen.layers
            yield self.failed(
                Reason.UNREACHED, observed=names.count, limit=0, total=total, steps=len(steps), names=names
            )
