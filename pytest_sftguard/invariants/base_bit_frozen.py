"""B8: the base model is bit for bit what it was."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard.records import RunRecord
from pytest_sftguard.verdicts import Finding, Invariant


@dataclass(frozen=True, kw_only=True)
class BaseBitFrozen(Invariant):
    """Every parameter and buffer outside the adapter has the same digest before and after, and takes no gradient."""

    code: ClassVar[str] = "B8"

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Compare the digests."""
        base = record.base
        if base is None or not base.tensors or not base.digest_before or not base.digest_after:
            yield self.not_evaluated("no base tensor was digested")
            return
        if base.trainable:
            yield self.failed(
                f"{base.trainable.count} tensors of the base are trainable, and the adapter file will not hold them:"
                f" {base.trainable}",
                observed=base.trainable.count, limit=0,
            )  # fmt: skip
        if base.changed or base.digest_before != base.digest_after:
            yield self.failed(
                f"{base.changed.count or 'some'} of {base.tensors} base tensors changed in training: {base.changed}",
                observed=base.changed.count or None, limit=0,
            )  # fmt: skip
