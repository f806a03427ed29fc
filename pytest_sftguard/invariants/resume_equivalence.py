"""C4: a training that is interrupted and resumed goes on as if nothing had happened."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from pytest_sftguard import verdicts
from pytest_sftguard.invariants._comparing import Comparing, exact, gap, same_bits
from pytest_sftguard.precision import mode_named
from pytest_sftguard.records import RunRecord, StepRecord
from pytest_sftguard.verdicts import Finding

_RESUMED = "where the training is interrupted after step {checkpoint} and resumed"


class Reason(verdicts.Reason):
    """What is not the same when a training is interrupted and resumed."""

    ROWS = f"step {{step}} sees other rows {_RESUMED}"
    DIFFERS = f"the {{name}} of step {{step}} is {{limit}}, and {{observed}} {_RESUMED}"
    SCHEDULE = f"{DIFFERS}: the schedule lost its state"
    SCALE = f"{DIFFERS}: the loss scaler lost its state"
    NOT_RESTORED = (
        "resuming from the checkpoint of step {checkpoint} does not restore {observed:# trainable tensor}: {names}"
    )


_STATE = {"learning_rate": Reason.SCHEDULE, "loss_scale": Reason.SCALE}
_BITS = ("loss", "grad_norm", "max_update")


@dataclass(frozen=True, kw_only=True)
class ResumeEquivalence(Comparing):
    """From the checkpoint on rows, learning rates and loss scales are the same, and so are losses and adapter.

    By one thread of a CPU to the bit, else within what the order of sums moves: so too where the model keeps buffers
    of its own that no checkpoint holds, such as rotary frequencies that follow the longest row so far, and where an
    optimizer keeps float32 states of parameters in half precision.
    """

    loss_rtol: float | None = None
    """Largest difference of a loss where the order of sums is not fixed, as a share of the first; None: what is allowed
    for later steps in the cell's precision, as differences grow from step to step."""
    max_update_rtol: float = 0.5
    """Largest difference of a step's largest update there, as a share: an optimizer that began anew takes a full first
    step, where one that goes on may take a tenth of it."""

    code: ClassVar[str] = "C4"
    reference: ClassVar[str] = "resumed"

    def compare(self, record: RunRecord, reference: RunRecord) -> Iterator[Finding]:
        """Compare step by step, then the trained adapters."""
        if unequal := self.other_length(record, reference):
            yield unequal
            return
        if lost := reference.not_restored:
            yield from self.forbid(Reason.NOT_RESTORED, lost, checkpoint=record.max_steps // 2)
            return
        # working buffers are in no checkpoint
        working = any(r.base is None or r.base.rewritten for r in (record, reference))
        # torch rounds what it loads to the type of the parameter, which checkpoint_round_trip says
        narrowed = record.checkpoint is not None and record.checkpoint.narrowed
        bits = exact(record, reference) and not (working or narrowed)
        for ours, theirs in zip(record.steps, reference.steps, strict=True):
            found = self.unseen(ours, "loss", "learning_rate", "max_update") or self._step(record, ours, theirs, bits)
            if found:
                yield found
                return
        if bits:
            yield from self.adapters(record, reference)

    def _step(self, record: RunRecord, ours: StepRecord, theirs: StepRecord, bits: bool) -> Finding | None:
        seen: dict[str, Any] = {"step": ours.step, "checkpoint": record.max_steps // 2}
        if ours.rows != theirs.rows:
            return self.failed(Reason.ROWS, **seen)
        for name in (*_STATE, *_BITS):
            if not self._agree(record, name, ours, theirs, bits):
                one, other, reason = getattr(ours, name), getattr(theirs, name), _STATE.get(name, Reason.DIFFERS)
                return self.failed(reason, observed=other, limit=one, name=name, **seen)
        return None

    def _agree(self, record: RunRecord, name: str, ours: StepRecord, theirs: StepRecord, bits: bool) -> bool:
        one, other = getattr(ours, name), getattr(theirs, name)
        if bits or name in _STATE or one is None or other is None:
            return same_bits(name, ours, theirs)
        # the gradient of a late step is small, and a difference of small differences
        if name == "grad_norm":
            return True
        if name == "loss":
            usual = mode_named(record.precision).agreement.trajectory_rtol
            rtol = usual if self.loss_rtol is None else self.loss_rtol
            return bool(abs(one - other) <= rtol * abs(record.losses[0]))
        return gap(one, other) <= self.max_update_rtol
