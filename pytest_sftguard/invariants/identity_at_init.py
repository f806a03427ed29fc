"""A4: before the first step the adapter changes nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard import verdicts
from pytest_sftguard.precision import MODES
from pytest_sftguard.records import InitialRecord, RunRecord
from pytest_sftguard.verdicts import Finding, Invariant


class Reason(verdicts.Reason):
    """How the adapter's start is not neutral."""

    NOT_LOW_RANK = "the adapter has no low-rank factors"
    NOT_SEEN = "no pair of factors was seen"
    OTHER_SCALING = "the alpha and rank of the configuration do not give the scaling of {observed:# module}: {names}"
    ZERO_SCALING = (
        "the adapter of {observed:# module} is multiplied by lora_alpha / r = 0, so that it has no effect and gets no"
        " gradient: {names}"
    )
    ZERO_A = "{observed:# factor} must not start at zero and did, so that nothing passes: {names}"
    NONZERO_B = (
        "{observed:# factor} did not start at zero and changed with the seed, which a loaded adapter does not"
        " (init_lora_weights={init}): {names}"
    )
    ORIGIN_UNKNOWN = "{count:# factor} did not start at zero, and whether a file was loaded was not seen: {names}"
    NOT_COMPARED = "no logits were compared with the base's[[: {why}]]"
    OTHER_BITS = "{changed} of {logits:# logit} differed from the base's before the first step"
    NO_BASE_LOGITS = "the base's logits were not seen"
    FAR = "logits differ from the base's by {observed:.3g} before the first step"


@dataclass(frozen=True, kw_only=True)
class IdentityAtInit(Invariant):
    """One factor of each pair is random and the other zero, the scaling is the one asked for, and the base is heard.

    An adapter that comes out of a file was trained before, and may be anything.
    """

    rounded_rtol: float | None = None
    """Largest change of a logit, relative to the largest, where the start is neutral but for rounding (DoRA, whose
    magnitudes are norms; orthogonal factors, whose product is zero in exact arithmetic). None: 100 times the tolerance
    of the cell's precision for reloading, and 0.1 at most: such a start rounds anew in each layer, and reloading not.
    Measured for DoRA 0 in float32, 0.0006 in float16 and 0.005 in bfloat16, for orthogonal factors 2e-7; 1.25 for
    factors that were drawn at random."""

    code: ClassVar[str] = "A4"

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Look at the factors and at the logits with and without them."""
        if (initial := record.initial) is None:
            yield self.not_looked(record, "wiring")
            return
        if not initial.init:
            yield self.not_evaluated(Reason.NOT_LOW_RANK, required=False)
            return
        if not initial.factors >= 1:
            yield self.not_evaluated(Reason.NOT_SEEN)
            return
        yield from self.forbid(Reason.OTHER_SCALING, initial.wrong_scaling)
        yield from self.forbid(Reason.ZERO_SCALING, initial.zero_scaling)
        yield from self.forbid(Reason.ZERO_A, initial.zero_a)
        if initial.loaded is False:
            yield from self.forbid(Reason.NONZERO_B, initial.nonzero_b, init=initial.init)
        elif initial.nonzero_b and initial.loaded is None:
            yield self.not_evaluated(Reason.ORIGIN_UNKNOWN, count=initial.nonzero_b.count, names=initial.nonzero_b)
        # a trained adapter changes what the base says, and some starts change the base itself
        if initial.neutral and not (initial.nonzero_b and initial.loaded is not False):
            yield from self._logits(record, initial)

    def _logits(self, record: RunRecord, initial: InitialRecord) -> Iterator[Finding]:
        if initial.logits is None or initial.changed_logits is None or initial.max_logit_change is None:
            yield self.not_evaluated(Reason.NOT_COMPARED, required=not initial.uncompared, why=initial.uncompared)
            return
        if not initial.logits >= 1:
            yield self.not_evaluated(Reason.NOT_COMPARED)
        change = initial.max_logit_change
        if initial.identical:
            if initial.changed_logits != 0:
                seen = {"changed": initial.changed_logits, "logits": initial.logits}
                yield self.failed(Reason.OTHER_BITS, observed=change, limit=0, **seen)
            return
        if initial.max_abs_logit is None:
            yield self.not_evaluated(Reason.NO_BASE_LOGITS)
            return
        limit = self._rtol(record.precision) * initial.max_abs_logit
        if not (math.isfinite(limit) and change <= limit):
            yield self.failed(Reason.FAR, observed=change, limit=limit)

    def _rtol(self, precision: str) -> float:
        if self.rounded_rtol is not None:
            return self.rounded_rtol
        mode = MODES.get(precision)
        return min(0.1, 100 * mode.logits_rtol) if mode else 0.0
