"""C3: the same training, with the same seed, on the same machine, is the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard.invariants._comparing import agreement, apart, both_skipped, exact, same
from pytest_sftguard.records import RunRecord
from pytest_sftguard.verdicts import Finding, Invariant


@dataclass(frozen=True, kw_only=True)
class RerunBitEqual(Invariant):
    """A second run sees the same rows, and by one thread of a CPU gets the same bits; else the same first step."""

    loss_rtol: float | None = None
    """Largest difference of the first losses where the order of sums is not fixed (several threads, a GPU), as a share;
    None: the tolerance of the cell's precision."""

    grad_norm_rtol: float | None = None
    """Largest difference of the first gradients' norms there, in more than half of the tensors, as a share, and a
    fifteenth of that of the norm of all; None: the tolerance of the cell's precision."""

    code: ClassVar[str] = "C3"
    reference: ClassVar[str] = "rerun"

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Compare step by step, then the trained adapters."""
        if missing := self.not_compared(reference):
            yield missing
            return
        assert reference is not None
        if not record.steps or not reference.steps:
            yield self.not_evaluated("no optimizer step was seen")
        elif len(record.steps) != len(reference.steps):
            yield self.failed(
                f"it took {len(record.steps)} steps, and {len(reference.steps)} when it was run again",
                observed=len(reference.steps), limit=len(record.steps),
            )  # fmt: skip
        elif other := next((s.step for s, o in zip(record.steps, reference.steps, strict=True) if s.rows != o.rows), 0):
            yield self.failed(f"step {other} saw other rows when it was run again with the same seed", step=other)
        elif exact(record, reference):
            yield from self._bits(record, reference)
        else:
            yield from self._first_step(record, reference)

    def _bits(self, record: RunRecord, reference: RunRecord) -> Iterator[Finding]:
        for ours, theirs in zip(record.steps, reference.steps, strict=True):
            if ours.loss is None or ours.grad_norm is None:
                yield self.not_evaluated(f"step {ours.step} lacks its loss or its grad_norm")
                return
            for name in ("loss", "grad_norm", "learning_rate", "loss_scale"):
                one, other = getattr(ours, name), getattr(theirs, name)
                excused = name == "grad_norm" and both_skipped(ours, theirs)
                if not (one == other or (excused and same(one, other))):
                    yield self.failed(
                        f"the {name} of step {ours.step} is {one}, and was {other} when it was run again with the same"
                        " seed",
                        step=ours.step, observed=other, limit=one,
                    )  # fmt: skip
                    return
        if not record.adapter_digest or not reference.adapter_digest:
            yield self.not_evaluated("the trained adapter was not digested")
        elif record.adapter_digest != reference.adapter_digest:
            yield self.failed("the trained adapters differ, though every step had the same loss and gradients")

    def _first_step(self, record: RunRecord, reference: RunRecord) -> Iterator[Finding]:
        allowed = agreement(record)
        ours, theirs = record.steps[0], reference.steps[0]
        for name, given, usual in (
            ("loss", self.loss_rtol, allowed.loss_rtol),
            ("grad_norm", self.grad_norm_rtol, allowed.grad_norm_rtol),
        ):
            one, other = getattr(ours, name), getattr(theirs, name)
            rtol = usual if given is None else given
            if one is None or other is None:
                yield self.not_evaluated(f"the {name} of step 1 was not seen")
            elif name == "grad_norm" and both_skipped(ours, theirs):
                continue
            elif far := apart(name, (one, other), rtol, record, reference):
                yield self.failed(
                    f"the {name} of step 1 is {one:.6g}, and was {other:.6g} when it was run again with the same seed"
                    f"{far.note}",
                    step=1, observed=far.share, limit=far.limit,
                )  # fmt: skip
