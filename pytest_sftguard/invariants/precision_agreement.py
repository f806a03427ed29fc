"""C2: a training in another precision is the float32 training, but for rounding."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from pytest_sftguard import verdicts
from pytest_sftguard.invariants._comparing import MOST_IN, Both, ComparingSteps, moved, randomness, resolution, same
from pytest_sftguard.precision import MODES, mode_named
from pytest_sftguard.records import RunRecord, StepRecord
from pytest_sftguard.verdicts import Finding


class Reason(verdicts.Reason):
    """How a training differs from the float32 one."""

    FLOAT32_ITSELF = "the cell is the float32 one itself"
    QUANTISED = "no float32 cell has the rounded weights of a quantised base"
    SAMPLED = "the training learns from answers of the model itself, which are others in another precision"
    NOISE = "the training draws numbers with {name} in half precision, which are others in float32"
    REFERENCE_LOST = "the loss of the float32 reference is not finite at every step: it is no reference"
    NO_ROUNDING = "the losses and gradients of {steps:# step} are float32's to the bit: {precision} did not happen"
    DIFFERS = "the {name} of step {step} is {ours:.6g}, and {theirs:.6g} in float32" + MOST_IN
    UNSTABLE = (
        "the loss of step {step_of_gap} is {ours:.6g}, and {theirs:.6g} in float32, where it rises by as much from one"
        " step to the next: at this learning rate rounding may grow to that"
    )
    MOVED = (
        "{factor} moved by {ours:.4g} in {steps:# step}, and by {theirs:.4g} in float32[[, which took {float32_steps}]]"
    )


@dataclass(frozen=True, kw_only=True)
class PrecisionAgreement(ComparingSteps):
    """Loss and gradients of the first step, losses on the way and the adapter at the end agree with float32's.

    And they are not float32's to the bit, where the cell claims to compute in another type. A float32 loss that rises
    by leaps tells that the learning rate makes much of little: a loss on the way that is off by no more is no evidence.
    """

    trajectory_rtol: float | None = None
    """Largest difference of any two losses, as a share of the first; None: the tolerance of the cell's precision."""
    update_ratio: float = 1.5
    """Factor by which the `lora_A`, the `lora_B`, or the other tensors together may have moved further than in float32,
    or less far. Measured 0.994 to 1.02 over all modes where every step was taken; bfloat16 adapters that round their
    updates away have 0.47 or less, moments that underflow in float16 hundreds."""

    code: ClassVar[str] = "C2"
    reference: ClassVar[str] = "fp32"
    differs: ClassVar[Reason] = Reason.DIFFERS

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Compare the run with its float32 sibling, which it may be itself, and which a quantised base cannot have."""
        mode = MODES.get(record.precision)
        if mode is not None and mode.quantisation:
            yield self.not_evaluated(Reason.QUANTISED, required=False)
        elif record.precision == "fp32":
            yield self.not_evaluated(Reason.FLOAT32_ITSELF, required=False)
        else:
            yield from super().check(record, reference)

    def compare(self, record: RunRecord, reference: RunRecord) -> Iterator[Finding]:
        """Compare the first step, then the losses on the way, then the adapter at the end."""
        if not all(map(math.isfinite, reference.losses)):
            yield self.not_evaluated(Reason.REFERENCE_LOST, required=False)
        elif obstacle := self._obstacle(record, reference):
            yield obstacle
        else:
            yield from self._rounded(record, reference)
            yield from self._first_step(record, reference)
            yield from self._trajectory(record, reference)
            yield from self._updates(record, reference)

    def _obstacle(self, record: RunRecord, reference: RunRecord) -> Finding | None:
        # on a CPU dropout drops the same in all types: measured
        if record.device.device_type != "cpu" and randomness(record, reference):
            return self.not_evaluated(Both.RANDOM, required=False, reference=reference.cell)
        if record.first_step is not None and record.first_step.noise:
            return self.not_evaluated(Reason.NOISE, required=False, name=record.first_step.noise)
        if record.first_step is not None and record.first_step.sampled:
            return self.not_evaluated(Reason.SAMPLED, required=False)
        rows = self.other_rows(record, reference)
        return rows if rows and rows.because(Both.OTHER_ROWS) else None

    def _rounded(self, record: RunRecord, reference: RunRecord) -> Iterator[Finding]:
        """A cell that is float32's to the bit has computed in float32."""
        if mode_named(record.precision).compute_dtype == "float32":
            return
        pairs = list(zip(record.steps, reference.steps, strict=False))
        if all(same(s.loss, r.loss) and same(s.grad_norm, r.grad_norm) for s, r in pairs):
            steps, precision = len(pairs), record.precision
            yield self.failed(Reason.NO_ROUNDING, step=1, observed=0.0, limit="> 0", steps=steps, precision=precision)

    def _first_step(self, record: RunRecord, reference: RunRecord) -> Iterator[Finding]:
        allowed = mode_named(record.precision).agreement
        loss_rtol = max(allowed.fp32_loss_rtol, 2 * resolution(record, reference))
        yield from self.value("loss", loss_rtol, record, reference)
        # the gradients of a skipped step are not finite, and that is what scaling is for
        if record.steps[0].effect != "skipped_by_scaler":
            yield from self.value("grad_norm", allowed.fp32_grad_norm_rtol, record, reference)

    def _trajectory(self, record: RunRecord, reference: RunRecord) -> Iterator[Finding]:
        """The losses of all steps, where both runs took the same ones: a step that is skipped puts one behind."""
        pairs = list(zip(record.steps, reference.steps, strict=False))
        if any(ours.effect == "skipped_by_scaler" for ours, _ in pairs):
            return
        usual = mode_named(record.precision).agreement.trajectory_rtol
        allowed = usual if self.trajectory_rtol is None else self.trajectory_rtol
        first = abs(reference.losses[0])
        rise, before = 0.0, reference.losses[0]
        for step, theirs in pairs[1:]:
            one, other = (math.nan if s.loss is None else s.loss for s in (step, theirs))
            gap = abs(one - other)
            rise, before = max(rise, other - before), other
            share = gap / first if first else gap
            if not share <= allowed:
                seen: dict[str, Any] = {"ours": one, "theirs": other}
                if gap <= rise:
                    yield self.not_evaluated(Reason.UNSTABLE, required=False, step_of_gap=step.step, **seen)
                else:
                    seen["name"] = "loss"
                    yield self.failed(Reason.DIFFERS, step=step.step, observed=share, limit=allowed, **seen)
                return

    def _updates(self, record: RunRecord, reference: RunRecord) -> Iterator[Finding]:
        """How far the adapter came, steps that were skipped allowed for."""
        ours, lag, ratio = moved(record), _lag(record, reference), self.update_ratio
        seen: dict[str, Any] = {"steps": len(_taken(record))}
        seen |= {"float32_steps": len(_taken(reference)) if lag > 1 else None}
        for factor, theirs in moved(reference).items():
            own = ours.get(factor, math.nan)
            if not (own <= ratio * theirs and theirs <= ratio * lag * own):
                seen |= {"factor": factor, "ours": own, "theirs": theirs}
                limit = f"{1 / (ratio * lag) if ratio else math.inf:.3g} to {ratio:.3g}"
                yield self.failed(Reason.MOVED, observed=own / theirs if theirs else own, limit=limit, **seen)


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
