"""B24: a checkpoint gives back what was saved."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard import verdicts
from pytest_sftguard.records import CheckpointRecord, RunRecord
from pytest_sftguard.verdicts import Finding, Invariant

_LOOKS = ("large_checkpoints", "checkpoints")


class Reason(verdicts.Reason):
    """What a checkpoint does not give back, or why that is not known."""

    NOT_LOADED = "loading a checkpoint does not give back {observed:# state} of {optimizer} that it saved: {names}"
    ADDED = "loading a checkpoint gives {optimizer} {observed:# state} that it did not save: {names}"
    CHANGED = (
        "loading a checkpoint changes {changed} of {tensors:# state tensor} of {optimizer}, {worst} the most"
        "[[: by {distance:.3g} of its norm]][[, {got:.6g} in place of {expected:.6g}]]"
    )
    OTHER_VALUES = "loading a checkpoint changes {names}: the first is {got}, and was {expected}"
    NARROWED = "torch rounds {names} to the type of the parameter on loading, so that their bits cannot be the same"
    UNREAD = "{names}: states of this class have no bits to compare"
    NOTHING = "nothing of the checkpoint was compared"


@dataclass(frozen=True, kw_only=True)
class CheckpointRoundTrip(Invariant):
    """What the Trainer saves of optimizer, schedule and loss scaler comes back bit for bit when it loads it."""

    code: ClassVar[str] = "B24"

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Look at states that are not there, at their bits, and at the options beside them."""
        seen = record.checkpoint
        if seen is None:
            yield self.not_looked(record, _asked(record))
            return
        if not seen.tensors + seen.values + seen.unread.count + seen.lost.count >= 1:
            yield self.not_evaluated(Reason.NOTHING)
        yield from self.forbid(Reason.NOT_LOADED, seen.lost, optimizer=seen.optimizer)
        yield from self.forbid(Reason.ADDED, seen.added, optimizer=seen.optimizer)
        if seen.changed:
            yield self._changed(seen)
        expected, got = seen.other_expected, seen.other_got
        yield from self.forbid(Reason.OTHER_VALUES, seen.other_values, expected=expected, got=got)
        for reason, names in ((Reason.NARROWED, seen.narrowed), (Reason.UNREAD, seen.unread)):
            if names:
                yield self.not_evaluated(reason, required=False, names=names)

    def _changed(self, seen: CheckpointRecord) -> Finding:
        return self.failed(
            Reason.CHANGED,
            observed=seen.distance,
            limit=0,
            changed=seen.changed.count,
            tensors=seen.tensors,
            optimizer=seen.optimizer,
            names=seen.changed,
            worst=seen.worst,
            distance=seen.distance,
            expected=seen.expected,
            got=seen.got,
        )


def _asked(record: RunRecord) -> str:
    """The look that should have filled the record: one that broke, or else the last that was asked for."""
    asked = [look for name in _LOOKS if (look := record.look(name)) is not None]
    broken = [look for look in asked if look.error]
    return next((look.name for look in (*broken, *asked)), _LOOKS[-1])
