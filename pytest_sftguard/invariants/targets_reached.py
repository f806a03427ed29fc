"""A17: what the adapter's targets name is adapted throughout the model, and not in a part of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard import verdicts
from pytest_sftguard.records import RunRecord
from pytest_sftguard.verdicts import Finding, Invariant


class Reason(verdicts.Reason):
    """What the targets name and the adapter does not reach."""

    NO_ADAPTER = "the model has no adapter"
    FUSED = (
        "target_modules names {observed:# weight} of experts in one tensor, which it cannot match, and reaches the"
        " dense layers of the same name alone: {names}; name them in target_parameters"
    )
    LEFT_OUT = "{observed:# layer} with the name of a target had no adapter, and others of this name had: {names}"
    ONE_DIGIT = (
        r"the regular expression of target_modules ends at layer 9, because \d is one digit: it misses"
        " {observed:# layer}, first {names}"
    )


@dataclass(frozen=True, kw_only=True)
class TargetsReached(Invariant):
    """No family of layers is reached by half, unless the configuration chooses layers."""

    code: ClassVar[str] = "A17"

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Look at what the targets miss."""
        if (wiring := record.wiring) is None:
            yield self.not_looked(record, "wiring")
            return
        if wiring.without_adapter:
            yield self.not_evaluated(Reason.NO_ADAPTER, required=False)
            return
        yield from self.forbid(Reason.FUSED, wiring.fused)
        yield from self.forbid(Reason.LEFT_OUT, wiring.left_out)
        yield from self.forbid(Reason.ONE_DIGIT, wiring.beyond_one_digit)
