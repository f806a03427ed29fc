"""B18: dropout drops in training, and another part in each micro-batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard import verdicts
from pytest_sftguard.records import RandomnessRecord, RunRecord
from pytest_sftguard.verdicts import Finding, Invariant


class Reason(verdicts.Reason):
    """How randomness is missing, or why that cannot be told."""

    EVALUATING = "the model trains in evaluation mode, which turns off its dropout of {p:g}"
    OFF = (
        "{observed} of {total:# dropout layer} of the adapter dropped nothing in training, though {p:g} is asked for:"
        " {names}"
    )
    REPEATED = "step {step} began with the random state of step {earlier}, so that it dropped the same elements"
    NOT_SEEN = "no forward pass of the training was seen"
    NOT_DRAWN = "the training draws no random numbers"


@dataclass(frozen=True, kw_only=True)
class RandomnessAlive(Invariant):
    """Dropout that the configuration asks for is on in training, and its masks differ between micro-batches.

    A base in evaluation mode under an adapter that trains, such as a frozen vision tower, is no fault: the whole model
    must be in that mode, or more than half of the adapter's own dropout layers must drop nothing.
    """

    max_off_fraction: float = 0.5
    """Share of the adapter's dropout layers that may drop nothing, as those in a frozen part may."""

    code: ClassVar[str] = "B18"

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Look at the model's mode, at the adapter's dropout layers, and at the generator's states."""
        seen = record.randomness
        if seen is None:
            yield self.not_looked(record, "randomness")
            return
        if seen.evaluating is None and not seen.compared:
            yield self.not_evaluated(Reason.NOT_SEEN, required=False)
            return
        off = list(self._off(seen))
        yield from off
        if seen.repeated_step is not None:
            yield self.failed(Reason.REPEATED, step=seen.repeated_step, earlier=seen.repeats_step)
        elif not off and not seen.drawing:
            yield self.not_evaluated(Reason.NOT_DRAWN, required=False)

    def _off(self, seen: RandomnessRecord) -> Iterator[Finding]:
        asked = max(seen.adapter_dropout, seen.base_dropout if seen.other_off or not seen.other_dropouts else 0.0)
        if seen.evaluating and asked > 0 and not _drops(seen):
            yield self.failed(Reason.EVALUATING, step=1, limit="training mode", p=asked)
            return
        count, total = seen.adapter_off.count, seen.adapter_dropouts
        if seen.adapter_dropout > 0 and not count <= self.max_off_fraction * total:
            more = {"total": total, "p": seen.adapter_dropout, "names": seen.adapter_off}
            yield self.failed(Reason.OFF, step=1, observed=count, limit=self.max_off_fraction * total, **more)


def _drops(seen: RandomnessRecord) -> bool:
    """Whether some dropout layer dropped something."""
    return seen.adapter_off.count < seen.adapter_dropouts or seen.other_off.count < seen.other_dropouts
