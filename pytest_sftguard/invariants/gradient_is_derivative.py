"""A12: the gradient that backward gives is the derivative of the loss."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard import verdicts
from pytest_sftguard.records import DerivativeRecord, DirectionRecord, RunRecord
from pytest_sftguard.verdicts import Finding, General, Invariant, Outcome

_SAME_RATIO = 0.02
"""How closely all directions must have one ratio of gradient and derivative for the gradient to count as scaled."""


class Reason(verdicts.Reason):
    """How the gradient differs from the derivative, or why that is not known."""

    NOT_THE_DERIVATIVE = (
        "the gradient is not the derivative of the loss: along {tensors} it is {off:.3g} off"
        "[[; seen from the loss, it is first wrong at {tensor}]][[, {earlier}]]"
    )
    SCALED = "the gradient is {ratio:.3g} times the derivative of the loss that compute_loss returns"
    DETACHED = (
        "a layer stops gradients that the loss depends on, at {names}: along {tensors} the gradient is {off:.3g} off"
    )
    HOOKED = (
        "a hook of the training changes the gradient of {observed:# tensor} after backward, {names}: {hook}"
        "[[; it multiplies it by {factor:.4g}]][[; it moves it by {distance:.3g} of its norm]]"
    )
    UNSETTLED = "the loss is too rough or too flat for differences: none of {asked:# direction} gave a derivative"
    NOT_ALL_COMPARED = "{made} of {asked:# direction} gave a derivative that is a number"
    STOPS_UNKNOWN = (
        "along {tensors} the gradient is {off:.3g} off, and what the loss treats as constant could not be held constant"
    )


@dataclass(frozen=True, kw_only=True)
class GradientIsDerivative(Invariant):
    """Along random directions in the trainable tensors, the gradient agrees with central differences of the loss.

    In float32, on the first micro-batch, and on one of each of the last two steps at the trained weights. What the loss
    treats as constant on purpose is held constant. Hooks on a tensor that change its gradient fail, but for those that
    clip it or set entries to zero.
    """

    limit: float = 0.02
    """Largest error along a direction, relative to the usual size of a derivative there. Measured at most 0.0097 in 81
    healthy trainings, where rounding and kinks make the error; 0.06 to 2 along the worst direction in ten faulty ones:
    SiLU and a norm with a wrong backward, one factor's gradient doubled, a loss that is scaled before backward."""

    code: ClassVar[str] = "A12"

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Look at the direction with the largest error; it speaks for the others."""
        if record.derivative is None:
            yield self.not_looked(record, "first_batch")
            return
        for seen in (record.derivative, *record.later_derivatives):
            found = list(self._of(seen))
            yield from found
            # what is wrong at first is wrong later, too
            if any(f.outcome is Outcome.FAILED for f in found):
                return

    def _of(self, seen: DerivativeRecord) -> Iterator[Finding]:
        if seen.changed:
            factor, distance = seen.hook_factor, seen.hook_distance if seen.hook_factor is None else None
            yield from self.forbid(
                Reason.HOOKED, seen.changed, step=seen.at_step, hook=seen.hook, factor=factor, distance=distance
            )
        if seen.error:
            yield self.not_evaluated(General.LOOK_BROKE, name="first_batch", error=seen.error, required=False)
            return
        if seen.left_out:
            yield self.not_evaluated(General.INAPPLICABLE, why=seen.left_out, required=False)
            return
        if not seen.directions and seen.unsettled == seen.asked:
            yield self.not_evaluated(Reason.UNSETTLED, asked=seen.asked, required=False)
            return
        made = [d for d in seen.directions if _is_known(d)]
        if not (len(made) == len(seen.directions) == seen.asked - seen.unsettled and math.isfinite(seen.loss)):
            yield self.not_evaluated(Reason.NOT_ALL_COMPARED, made=len(made), asked=seen.asked)
        wrong = [d for d in seen.directions if not d.error <= self.limit]
        unknown = [d for d in wrong if d.held_error is None]
        held = [d for d in wrong if d.held_error is not None and not d.held_error <= self.limit]
        if held:
            yield self._wrong(seen, held)
        elif unknown:
            worst = _worst(unknown)
            yield self.not_evaluated(Reason.STOPS_UNKNOWN, tensors=worst.tensors, off=worst.error, required=False)
        elif wrong and seen.detached:
            worst = _worst(wrong)
            yield self.failed(
                Reason.DETACHED,
                step=_late(seen),
                observed=worst.error,
                limit=self.limit,
                names=seen.detached,
                tensors=worst.tensors,
                off=worst.error,
            )

    def _wrong(self, seen: DerivativeRecord, wrong: list[DirectionRecord]) -> Finding:
        worst = max(wrong, key=lambda d: d.held_error or 0.0)
        off = worst.held_error
        if len(wrong) > 1 and worst.ratio is not None and self._one_ratio(seen, worst.ratio):
            return self.failed(Reason.SCALED, step=_late(seen), observed=off, limit=self.limit, ratio=worst.ratio)
        earlier = {True: "and at tensors before it", False: "and at none before it", None: None}[seen.upstream]
        return self.failed(
            Reason.NOT_THE_DERIVATIVE,
            step=_late(seen),
            observed=off,
            limit=self.limit,
            off=off,
            tensors=worst.tensors,
            tensor=seen.tensor or None,
            earlier=earlier if seen.tensor else None,
        )

    def _one_ratio(self, seen: DerivativeRecord, ratio: float) -> bool:
        """Whether the gradient is `ratio` times the derivative along every direction."""
        for d in seen.directions:
            if d.ratio is None:
                return False
            # the error with this ratio taken out
            rest = d.error * abs(d.ratio - ratio) / max(abs(d.ratio - 1), 1e-9)
            if not rest <= _SAME_RATIO:
                return False
        return True


def _late(seen: DerivativeRecord) -> int | None:
    """The step of a later micro-batch; the first one speaks of the model as it is built."""
    return seen.at_step if seen.at_step > 1 else None


def _is_known(direction: DirectionRecord) -> bool:
    return math.isfinite(direction.step) and (direction.ratio is None or math.isfinite(direction.ratio))


def _worst(directions: list[DirectionRecord]) -> DirectionRecord:
    return max(directions, key=lambda d: d.error)
