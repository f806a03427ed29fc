"""D2: the adapter has an effect that is more than noise, and without it the model is its base."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard import verdicts
from pytest_sftguard.invariants._reloaded import not_reloaded
from pytest_sftguard.records import RunRecord
from pytest_sftguard.verdicts import Finding, Invariant


class Reason(verdicts.Reason):
    """What the adapter does to the logits, and what is left of that where it is switched off."""

    NO_LOGITS = "no logits of the reloaded adapter and its base were seen"
    NO_EFFECT = (
        "the adapter moves no logit by more than {observed:.3g}, where the largest is {max_abs_logit:.3g}: that is"
        " rounding, not training"
    )
    NOT_DISABLED = "the trained model was not looked at with its adapter disabled"
    OTHER_BASE = "the trained model with its adapter disabled is not its base: logits differ by {observed:.3g}"


@dataclass(frozen=True, kw_only=True)
class EffectSize(Invariant):
    """The reloaded adapter moves the fresh base's logits; the trained model with its adapter off gives them exactly."""

    min_effect: float = 4.8e-7
    """Least change of a logit, relative to the largest one: 4 units of float32's last place, in which adapters
    compute. The same forward pass gives the same bits, so that this is no matter of luck. Measured: 3.6e-4 after 8
    steps at the learning rate 1e-6 in float32, 4.7e-3 in bfloat16; 0 where the adapter was lost on the way."""
    max_base_change: float = 0.0
    """Largest difference that disabling the adapter may leave, relative to the largest logit. None: the same kernel
    multiplies the same numbers. Not asked where the adapter took its start out of the base, or trains its biases."""

    code: ClassVar[str] = "D2"
    asks_for: ClassVar[tuple[str, ...]] = ("round_trip",)

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Look at the logits with the adapter, without it, and of the base that never had one."""
        trip = record.round_trip
        if broken := not_reloaded(self, record):
            yield broken
            return
        if trip is None or trip.max_abs_logit is None or trip.max_logit_effect is None:
            yield self.not_evaluated(Reason.NO_LOGITS)
            return
        least = self.min_effect * trip.max_abs_logit
        if not (math.isfinite(trip.max_logit_effect) and trip.max_logit_effect >= least):
            effect, largest = trip.max_logit_effect, trip.max_abs_logit
            yield self.failed(Reason.NO_EFFECT, observed=effect, limit=least, max_abs_logit=largest)
        # it need not be the base; or what follows from NaN would only repeat it
        if trip.base_differs or not math.isfinite(trip.max_abs_logit):
            return
        limit = self.max_base_change * trip.max_abs_logit
        if trip.max_base_change is None:
            yield self.not_evaluated(Reason.NOT_DISABLED)
        elif not trip.max_base_change <= limit:
            yield self.failed(Reason.OTHER_BASE, observed=trip.max_base_change, limit=limit)
