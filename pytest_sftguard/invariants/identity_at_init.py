"""A4: before the first step the adapter changes nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard.precision import MODES
from pytest_sftguard.records import InitialRecord, RunRecord
from pytest_sftguard.verdicts import Finding, Invariant


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
        initial = record.initial
        if initial is None:
            yield self.not_looked(record, "wiring")
            return
        if not initial.init:
            yield self.not_evaluated("the adapter has no low-rank factors", required=False)
            return
        if not initial.factors >= 1:
            yield self.not_evaluated("no pair of factors was seen")
            return
        yield from self._factors(initial)
        if not (initial.nonzero_b and initial.loaded is not False):  # a trained adapter changes what the base says
            yield from self._logits(record, initial)

    def _factors(self, initial: InitialRecord) -> Iterator[Finding]:
        if initial.wrong_scaling:
            yield self.failed(
                f"{initial.wrong_scaling.count} modules do not scale by the configuration's alpha and rank:"
                f" {initial.wrong_scaling}",
                observed=initial.wrong_scaling.count, limit=0,
            )  # fmt: skip
        if initial.zero_a:
            yield self.failed(
                f"{initial.zero_a.count} factors are zero that must not be, so that nothing passes: {initial.zero_a}",
                observed=initial.zero_a.count, limit=0,
            )  # fmt: skip
        if initial.nonzero_b and initial.loaded is None:
            yield self.not_evaluated(
                f"{initial.nonzero_b.count} factors do not start at zero ({initial.nonzero_b}), and whether they came"
                " out of a file was not seen"
            )
        elif initial.nonzero_b and not initial.loaded:
            yield self.failed(
                f"{initial.nonzero_b.count} factors do not start at zero, and are others under another seed, so that"
                f" no file holds them (init_lora_weights={initial.init}): {initial.nonzero_b}",
                observed=initial.nonzero_b.count, limit=0,
            )  # fmt: skip

    def _logits(self, record: RunRecord, initial: InitialRecord) -> Iterator[Finding]:
        if not initial.neutral:
            return  # the base without its adapter is not the base that it was made from
        if initial.logits is None or initial.changed_logits is None or initial.max_logit_change is None:
            seen = initial.uncompared
            yield self.not_evaluated(seen or "no logits were compared with the base's", required=not seen)
            return
        if not initial.logits >= 1:
            yield self.not_evaluated("no logits were compared with the base's")
        if initial.identical:
            if initial.changed_logits != 0:
                yield self.failed(
                    f"{initial.changed_logits} of {initial.logits} logits are not the base's bit for bit before the"
                    " first step",
                    observed=initial.max_logit_change, limit=0,
                )  # fmt: skip
            return
        if initial.max_abs_logit is None:
            yield self.not_evaluated("the base's logits were not seen")
            return
        limit = self._rtol(record.precision) * initial.max_abs_logit
        if not (math.isfinite(limit) and initial.max_logit_change <= limit):
            yield self.failed(
                f"logits differ from the base's by {initial.max_logit_change:.3g} before the first step",
                observed=initial.max_logit_change, limit=limit,
            )  # fmt: skip

    def _rtol(self, precision: str) -> float:
        if self.rounded_rtol is not None:
            return self.rounded_rtol
        mode = MODES.get(precision)
        return min(0.1, 100 * mode.logits_rtol) if mode else 0.0
