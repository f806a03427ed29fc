"""C4: a training that is interrupted and resumed goes on as if nothing had happened."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard.invariants._comparing import agreement, both_skipped, exact, gap, same
from pytest_sftguard.records import RunRecord, StepRecord
from pytest_sftguard.verdicts import Finding, Invariant

_STATE = {
    "learning_rate": ": the schedule began anew",
    "loss_scale": ": the loss scaler began anew",
}
_BITS = ("loss", "grad_norm", "max_update")


@dataclass(frozen=True, kw_only=True)
class ResumeEquivalence(Invariant):
    """From the checkpoint on rows, learning rates and loss scales are the same, and so are losses and adapter.

    By one thread of a CPU to the bit, else within what the order of sums moves: so too where the model keeps buffers
    of its own that no checkpoint holds, such as rotary frequencies that follow the longest row so far.
    """

    loss_rtol: float | None = None
    """Largest difference of a loss where the order of sums is not fixed, as a share of the first; None: what is allowed
    for later steps in the cell's precision, as differences grow from step to step."""

    max_update_rtol: float = 0.5
    """Largest difference of a step's largest update there, as a share: an optimizer that began anew takes a full first
    step, where one that goes on may take a tenth of it."""

    code: ClassVar[str] = "C4"
    reference: ClassVar[str] = "resumed"

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Compare step by step, then the trained adapters."""
        if missing := self.not_compared(reference):
            yield missing
            return
        assert reference is not None
        if not record.steps or not reference.steps:
            yield self.not_evaluated("no optimizer step was seen")
            return
        if len(record.steps) != len(reference.steps):
            yield self.failed(
                f"it took {len(record.steps)} steps in one go, and {len(reference.steps)} with an interruption",
                observed=len(reference.steps), limit=len(record.steps),
            )  # fmt: skip
            return
        working = any(r.base is None or r.base.rewritten for r in (record, reference))  # buffers no checkpoint holds
        bits = exact(record, reference) and not working
        for ours, theirs in zip(record.steps, reference.steps, strict=True):
            if ours.loss is None or ours.learning_rate is None or ours.max_update is None:
                yield self.not_evaluated(f"step {ours.step} lacks its loss, its learning rate or its update")
                return
            if found := self._step(record, ours, theirs, bits):
                yield found
                return
        if bits and not (record.adapter_digest and reference.adapter_digest):
            yield self.not_evaluated("the trained adapter was not digested")
        elif bits and record.adapter_digest != reference.adapter_digest:
            yield self.failed("the adapter differs from that of the training in one go, though every step was the same")

    def _step(self, record: RunRecord, ours: StepRecord, theirs: StepRecord, bits: bool) -> Finding | None:
        when = self._when(record, ours.step)
        if ours.rows != theirs.rows:
            return self.failed(f"{when} step {ours.step} sees other rows than without an interruption", step=ours.step)
        for name in (*_STATE, *_BITS):
            one, other = getattr(ours, name), getattr(theirs, name)
            if one is not None and other is None:
                return self.failed(f"{when} step {ours.step} lacks {name}", step=ours.step, limit=one)
            if not self._agree(record, name, (one, other), bits, both_skipped(ours, theirs)):
                return self.failed(
                    f"{when} the {name} of step {ours.step} is {other}, and {one} without an interruption"
                    f"{_STATE.get(name, '')}",
                    step=ours.step, observed=other, limit=one,
                )  # fmt: skip
        return None

    def _agree(
        self, record: RunRecord, name: str, pair: tuple[float | None, float | None], bits: bool, skipped: bool
    ) -> bool:
        one, other = pair
        if one is None or other is None:
            return one is other
        if skipped and name == "grad_norm":
            return True if not bits else same(one, other)
        if bits or name in _STATE:
            return one == other
        if name == "grad_norm":
            return True  # of late steps it is small, and a difference of small differences
        loss_rtol = agreement(record).trajectory_rtol if self.loss_rtol is None else self.loss_rtol
        if name == "loss":
            return abs(one - other) <= loss_rtol * abs(record.losses[0])
        return gap(one, other) <= self.max_update_rtol

    def _when(self, record: RunRecord, step: int) -> str:
        """In which part of the interrupted training `step` was: the checkpoint is half-way."""
        return "after resuming," if step > record.max_steps // 2 else "before the interruption,"
