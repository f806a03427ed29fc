"""C2: a training in another precision is the float32 training, but for rounding."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard.invariants._comparing import agreement, apart, moved, other_rows, randomness, resolution, same
from pytest_sftguard.precision import MODES
from pytest_sftguard.records import RunRecord, StepRecord
from pytest_sftguard.verdicts import Finding, Invariant


@dataclass(frozen=True, kw_only=True)
class PrecisionAgreement(Invariant):
    """Loss and gradients of the first step, losses on the way and the adapter at the end agree with float32's.

    And they are not float32's to the bit, where the cell claims to compute in another type.
    """

    loss_rtol: float | None = None
    """Largest difference of the first losses, as a share; None: the tolerance of the cell's precision."""

    grad_norm_rtol: float | None = None
    """Largest difference of the first gradients' norms in more than half of the tensors, as a share, and a fifteenth of
    that of the norm of all; None: the tolerance of the cell's precision."""

    trajectory_rtol: float | None = None
    """Largest difference of any two losses, as a share of the first; None: the tolerance of the cell's precision."""

    update_ratio: float = 1.5
    """Factor by which the `lora_A`, the `lora_B`, or the other tensors together may have moved further than in float32,
    or less far. Measured 0.994 to 1.02 over all modes where every step was taken; bfloat16 adapters that round their
    updates away have 0.47 or less, moments that underflow in float16 hundreds."""

    code: ClassVar[str] = "C2"
    reference: ClassVar[str] = "fp32"

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Compare the first step, then the way, then the end."""
        if record.precision == "fp32":
            yield self.not_evaluated("the cell is the float32 one itself", required=False)
            return
        if missing := self.not_compared(reference):
            yield missing
            return
        assert reference is not None
        if not record.steps or not reference.steps:
            yield self.not_evaluated("no optimizer step was seen")
            return
        if not all(map(math.isfinite, reference.losses)):
            yield self.not_evaluated("the float32 sibling lost its own loss: it is no reference", required=False)
            return
        if reason := self._incomparable(record, reference):
            yield self.not_evaluated(reason, required=False)
            return
        yield from self._another(record, reference)
        yield from self._first_step(record, reference)
        yield from self._trajectory(record, reference)
        yield from self._updates(record, reference)

    def _incomparable(self, record: RunRecord, reference: RunRecord) -> str:
        drawn = randomness(record, reference)
        if drawn and record.device.device_type != "cpu":  # on a CPU the draws are the same in all types: measured
            return "the model draws random numbers in training, which differ by type on this device"
        seen = [r.steps[0].rows for r in (record, reference)]
        return "" if None in seen else other_rows(record, reference)

    def _another(self, record: RunRecord, reference: RunRecord) -> Iterator[Finding]:
        """A cell that is float32's to the bit has computed in float32."""
        mode = MODES.get(record.precision)
        if mode is None or mode.compute_dtype == "float32":
            return
        pairs = list(zip(record.steps, reference.steps, strict=False))
        if all(same(s.loss, r.loss) and same(s.grad_norm, r.grad_norm) for s, r in pairs):
            yield self.failed(
                f"losses and gradients of all {len(pairs)} steps are float32's to the bit: {record.precision} did not"
                " happen",
                step=1, observed=0.0, limit="> 0",
            )  # fmt: skip

    def _first_step(self, record: RunRecord, reference: RunRecord) -> Iterator[Finding]:
        allowed = agreement(record)
        ours, theirs = record.steps[0], reference.steps[0]
        loss_rtol = max(allowed.fp32_loss_rtol, 2 * resolution(record, reference))
        wanted = [("loss", loss_rtol if self.loss_rtol is None else self.loss_rtol)]
        if ours.effect != "skipped_by_scaler":  # its gradients are not finite, and that is what scaling is for
            rtol = allowed.fp32_grad_norm_rtol if self.grad_norm_rtol is None else self.grad_norm_rtol
            wanted.append(("grad_norm", rtol))
        for name, rtol in wanted:
            one, other = getattr(ours, name), getattr(theirs, name)
            if one is None or other is None:
                yield self.not_evaluated(f"the {name} of step 1 was not seen")
            elif far := apart(name, (one, other), rtol, record, reference):
                yield self.failed(
                    f"the {name} of step 1 is {one:.6g}, and {other:.6g} in float32{far.note}",
                    step=1, observed=far.share, limit=far.limit,
                )  # fmt: skip

    def _trajectory(self, record: RunRecord, reference: RunRecord) -> Iterator[Finding]:
        """The losses of all steps, where both runs took the same ones: a step that is skipped puts one behind."""
        pairs = list(zip(record.steps, reference.steps, strict=False))
        if any(ours.effect == "skipped_by_scaler" for ours, _ in pairs):
            return
        allowed = agreement(record).trajectory_rtol if self.trajectory_rtol is None else self.trajectory_rtol
        first = abs(reference.losses[0])
        for ours, theirs in pairs[1:]:
            one, other = (math.nan if s.loss is None else s.loss for s in (ours, theirs))
            apart = abs(one - other) / first if first else abs(one - other)
            if not apart <= allowed:
                yield self.failed(
                    f"the loss of step {ours.step} is {one:.6g}, and {other:.6g} in float32",
                    step=ours.step, observed=apart, limit=allowed,
                )  # fmt: skip
                return

    def _updates(self, record: RunRecord, reference: RunRecord) -> Iterator[Finding]:
        """How far the adapter came, steps that were skipped allowed for."""
        ours, others = moved(record), moved(reference)
        lag = _lag(record, reference)
        for kind, distance in others.items():
            own = ours.get(kind, math.nan)
            limit = self.update_ratio
            if not (own <= limit * distance and distance <= limit * lag * own):
                yield self.failed(
                    f"{kind} moved by {own:.4g} in {len(_taken(record))} steps, and by {distance:.4g} in float32"
                    + (f", which took {len(_taken(reference))}" if lag > 1 else ""),
                    observed=own / distance if distance else own,
                    limit=f"{1 / (limit * lag) if limit else math.inf:.3g} to {limit:.3g}",
                )  # fmt: skip


def _taken(record: RunRecord) -> list[StepRecord]:
    return [s for s in record.steps if s.effect == "applied"]


def _lag(record: RunRecord, reference: RunRecord) -> float:
    """The factor by which the reference may have come further for the steps that a loss scaler skipped.

    Either their number or their learning rates: with a fused optimizer the schedule runs on at a skipped step, so that
    the first steps of a schedule that falls are gone with the best part of the way (accelerate#4242).
    """
    if not any(s.effect == "skipped_by_scaler" for s in record.steps):
        return 1.0
    runs = _taken(record), _taken(reference)
    counts = [float(len(steps)) for steps in runs]
    rates = [sum(s.learning_rate or 0.0 for s in steps) for steps in runs]
    further = [theirs / ours for ours, theirs in (counts, rates) if ours > 0]
    return max([1.0, *filter(math.isfinite, further)])
