"""A5: the base that the adapter is trained on is whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard import verdicts
from pytest_sftguard.records import RunRecord
from pytest_sftguard.verdicts import Finding, Invariant


class Reason(verdicts.Reason):
    """What the base lacks before the first step."""

    NOT_SEEN = "no tensor of the base was seen"
    NO_BASE = "there is no base: every tensor of the model trains"
    NONFINITE = "{observed:# tensor} of the base held NaN or infinity before the first step: {names}"
    NOT_LOADED = "the checkpoint lacks {observed:# tensor} of the base, drawn at random instead: {names}"
    ZERO_MAGNITUDES = "{observed:# DoRA magnitude} held a zero, of which the direction is 0/0: {names}"
    ZERO_EMBEDDINGS = "the embedding of {observed:# token id} in use is zero throughout: {names}"


@dataclass(frozen=True, kw_only=True)
class BaseFinite(Invariant):
    """Every tensor of the base is finite and came out of the checkpoint, and no row in use is zero."""

    code: ClassVar[str] = "A5"

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Look at the base as it was before the first step."""
        if (base := record.foundation) is None:
            yield self.not_looked(record, "wiring")
            return
        if not base.tensors >= 1 and record.without_adapter:
            yield self.not_evaluated(Reason.NO_BASE, required=False)
        elif not base.tensors >= 1:
            yield self.not_evaluated(Reason.NOT_SEEN)
        yield from self.forbid(Reason.NONFINITE, base.nonfinite)
        yield from self.forbid(Reason.NOT_LOADED, base.not_loaded)
        yield from self.forbid(Reason.ZERO_MAGNITUDES, base.zero_magnitudes)
        yield from self.forbid(Reason.ZERO_EMBEDDINGS, base.zero_embeddings)
