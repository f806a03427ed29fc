"""B20: the gradients of LoRA's two factors belong to one product."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard import verdicts
from pytest_sftguard.records import RunRecord
from pytest_sftguard.verdicts import Finding, General, Invariant


class Reason(verdicts.Reason):
    """Where the two gradients do not agree, or why that cannot be asked."""

    APART = (
        "the gradients of lora_A and lora_B of {layer} are not those of one product B A at step {step}: they differ by"
        " {observed:.2g} of what the norms allow, and rounding in {dtype} by {limit:.2g} at most"
    )
    NO_PAIR = "no layer has two factors that train, and reach the output by their product alone"
    BOUNDED = "hooks clip the gradients of single tensors"
    OWN_LOSS = (
        "the loss is the target's own, and seems to depend on the factors by themselves, as a penalty on them does"
    )


@dataclass(frozen=True, kw_only=True)
class FactorGradientsAgree(Invariant):
    """A times the transposed gradient of A equals the transposed gradient of B times B, in each LoRA layer.

    Both are A G^T B, where G is the gradient for the product B A, if the loss depends on the factors by their product
    alone. It holds for any model, loss and data, for rsLoRA and DoRA, with dropout, checkpointing and accumulation.
    What changes the gradient of one factor, or parts of it, parts the two. What scales both alike is not seen here.
    """

    max_share: float = 1e-5
    """Largest difference in float32, relative to the norms of both factors times those of their gradients. Measured in
    155 healthy trainings: at most 1e-7; 1e-3 and more where the gradient of one factor is scaled by 1.01."""
    max_share_float16: float = 2**-9
    """The same where float16 or tf32 is computed in; measured: at most 1.6e-4."""
    max_share_bfloat16: float = 2**-6
    """The same where bfloat16 is computed in; measured: at most 1.2e-3."""

    code: ClassVar[str] = "B20"

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Find the first step whose worst layer is over the limit of the run's coarsest type."""
        if not record.steps:
            yield self.not_evaluated(General.NO_STEP, required=False)
            return
        seen = [s for s in record.steps if s.factor_mismatch is not None]
        bounded = any(s.factors_bounded for s in seen)
        if bounded or not any(s.factor_layer for s in seen):
            yield self.not_evaluated(Reason.BOUNDED if bounded else Reason.NO_PAIR, required=False)
            return
        dtype, limit = self._limit(record)
        apart = [s for s in seen if s.factor_mismatch is None or not s.factor_mismatch <= limit]
        if not apart:
            return
        own = record.first_step is None or not record.first_step.model_loss
        if own and len(apart) == len(seen) and len(seen) > 1:
            yield self.not_evaluated(Reason.OWN_LOSS, required=False)
            return
        first = apart[0]
        observed, layer = first.factor_mismatch, first.factor_layer
        yield self.failed(Reason.APART, step=first.step, observed=observed, limit=limit, layer=layer, dtype=dtype)

    def _limit(self, record: RunRecord) -> tuple[str, float]:
        """The coarsest type that the run computes in, and its limit."""
        types = {record.autocast_dtype, *record.compute_dtypes, *record.weights_dtypes}
        types |= {t.dtype for t in record.adapter}
        if "bfloat16" in types:
            return "bfloat16", self.max_share_bfloat16
        if "float16" in types:
            return "float16", self.max_share_float16
        return ("tf32", self.max_share_float16) if record.tf32 else ("float32", self.max_share)
