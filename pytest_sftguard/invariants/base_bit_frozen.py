"""B8: the base model is bit for bit what it was."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard import verdicts
from pytest_sftguard.records import Names, RunRecord
from pytest_sftguard.verdicts import Finding, Invariant


class Reason(verdicts.Reason):
    """How the base is not frozen."""

    NOT_SEEN = "no base tensor was digested"
    NO_BASE = "every tensor of the model trains, and none is frozen"
    TRAINABLE = "{observed:# tensor} of the base, which no adapter file holds, had requires_grad=True: {names}"
    CHANGED = "{observed} of {total:# base tensor} changed in training: {names}"
    CHANGED_DURING = (
        "{observed} of {total:# base tensor} differed inside train(), before step {step}, and were restored by its end:"
        " {names}"
    )
    REARRANGED = (
        "an evaluation let bitsandbytes rearrange the weights of {observed:# 4-bit layer} for inference on this CPU,"
        " and no gradient passes through them since: {names}; set support_avx512bf16_for_cpu = False on these layers"
    )
    OTHER_DIGEST = "the digest of the {total:# base tensor} changed in training"


@dataclass(frozen=True, kw_only=True)
class BaseBitFrozen(Invariant):
    """Every parameter and buffer outside the adapter has the same digest before and after, and takes no gradient.

    It has that digest inside `train()` too, where it is looked at before the first step and before the last one.
    """

    code: ClassVar[str] = "B8"

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Compare the digests."""
        base = record.base
        if base is not None and not base.tensors and record.without_adapter:
            yield self.not_evaluated(Reason.NO_BASE, required=False)
            return
        if base is None or not base.tensors or not base.digest_before or not base.digest_after:
            yield self.not_evaluated(Reason.NOT_SEEN)
            return
        yield from self.forbid(Reason.TRAINABLE, base.trainable)
        yield from self.forbid(Reason.CHANGED, base.changed, total=base.tensors)
        yield from self.forbid(Reason.REARRANGED, base.rearranged)
        if (during := record.base_during) is not None:
            only = Names.of(n for n in during.changed.first if n not in base.changed.first)
            yield from self.forbid(Reason.CHANGED_DURING, only, step=during.step, total=base.tensors)
        elif (look := record.look("base_during")) is not None and not look.inapplicable:
            yield self.not_looked(record, "base_during")
        if base.digest_before != base.digest_after and not base.changed:
            yield self.failed(Reason.OTHER_DIGEST, limit=0, total=base.tensors)
