"""A5: the base that the adapter is trained on is whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard.records import RunRecord
from pytest_sftguard.verdicts import Finding, Invariant


@dataclass(frozen=True, kw_only=True)
class BaseFinite(Invariant):
    """Every tensor of the base is finite and came out of the checkpoint, and no row in use is zero."""

    code: ClassVar[str] = "A5"

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Look at the base as it was before the first step."""
        base = record.foundation
        if base is None:
            yield self.not_looked(record, "wiring")
            return
        if not base.tensors >= 1:
            yield self.not_evaluated("no tensor of the base was seen")
        for what, names in (
            ("tensors of the base hold NaN or infinity before the first step", base.nonfinite),
            ("tensors of the base are not in its checkpoint, and were drawn at random", base.not_loaded),
            ("DoRA magnitudes hold a zero, of which the direction is 0/0", base.zero_magnitudes),
            ("token ids in use have an embedding that is zero throughout", base.zero_embeddings),
        ):
            if names:
                yield self.failed(f"{names.count} {what}: {names}", observed=names.count, limit=0)
