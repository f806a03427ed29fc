"""A1: what takes a gradient is the adapter that will be saved, all of it and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard.records import RunRecord
from pytest_sftguard.verdicts import Finding, Invariant


@dataclass(frozen=True, kw_only=True)
class TrainableSetExact(Invariant):
    """Every tensor of the active adapter trains, nothing else does, and every target that was asked for is there."""

    code: ClassVar[str] = "A1"

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Look at what takes a gradient before the first step."""
        wiring = record.wiring
        if wiring is None:
            yield self.not_looked(record, "wiring")
            return
        if not wiring.trainable >= 1:
            yield self.failed("no tensor takes a gradient", observed=wiring.trainable, limit="at least 1")
        if not wiring.modules >= 1:
            yield self.failed(
                "the active adapter is attached to no module", observed=wiring.modules, limit="at least 1"
            )
        for what, names in (
            ("tensors of the active adapter take no gradient", wiring.frozen),
            ("tensors take a gradient that are no part of the active adapter", wiring.strays),
            ("targets of the configuration match no module", wiring.unmatched),
            ("modules that a target names hold no factors", wiring.incomplete),
        ):
            if names:
                yield self.failed(f"{names.count} {what}: {names}", observed=names.count, limit=0)
        if wiring.disabled:
            yield self.failed("the adapter is switched off, so that no forward pass goes through it")
