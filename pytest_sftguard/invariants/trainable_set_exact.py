"""A1: what takes a gradient is the adapter that will be saved, all of it and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard import verdicts
from pytest_sftguard.records import RunRecord
from pytest_sftguard.verdicts import Finding, General, Invariant


class Reason(verdicts.Reason):
    """What trains beside the adapter, or does not."""

    NO_ADAPTER = "the model has no adapter: which of its own tensors train is the target's choice"
    NOT_ATTACHED = "the active adapter is attached to no module"
    FROZEN = "{observed:# tensor} of the active adapter must have requires_grad=True and did not: {names}"
    STRAYS = "{observed:# tensor} outside the active adapter had requires_grad=True: {names}"
    UNMATCHED = "{observed:# target} of the configuration matched no module: {names}"
    INCOMPLETE = "{observed:# module} that a target names had no factors: {names}"
    DISABLED = "the adapter is disabled, so that no forward pass goes through it"


@dataclass(frozen=True, kw_only=True)
class TrainableSetExact(Invariant):
    """Every tensor of the active adapter trains, nothing else does, and every target that was asked for is there."""

    code: ClassVar[str] = "A1"

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Hold what takes a gradient before the first step against the adapter's configuration."""
        if (wiring := record.wiring) is None:
            yield self.not_looked(record, "wiring")
            return
        if not wiring.trainable >= 1:
            yield self.failed(General.NO_TRAINABLE, observed=wiring.trainable, limit="at least 1")
        if wiring.without_adapter:
            yield self.not_evaluated(Reason.NO_ADAPTER, required=False)
            return
        if not wiring.modules >= 1:
            yield self.failed(Reason.NOT_ATTACHED, observed=wiring.modules, limit="at least 1")
        yield from self.forbid(Reason.FROZEN, wiring.frozen)
        yield from self.forbid(Reason.STRAYS, wiring.strays)
        yield from self.forbid(Reason.UNMATCHED, wiring.unmatched)
        yield from self.forbid(Reason.INCOMPLETE, wiring.incomplete)
        if wiring.disabled:
            yield self.failed(Reason.DISABLED)
