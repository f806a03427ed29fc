"""A9: what the model says of a token depends on the tokens before it in its own row, and on nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from pytest_sftguard import verdicts
from pytest_sftguard.records import ComparisonRecord, ContextRecord, RunRecord
from pytest_sftguard.verdicts import Finding, General, Invariant


class Reason(verdicts.Reason):
    """What the model's answer depended on beside the tokens before it, or could not be told of."""

    NOT_ALL_COMPARED = "{made} of {asked:# comparison} of rows took place"
    LOW_ROTARY = "rotary frequencies are kept in half precision, which cannot tell positions above 256 apart: {names}"
    OTHER_ROTARY = "rotary frequencies are not those that the architecture computes"
    BLIND = (
        "{observed:# row} of the given attention masks let a token see nothing, not even itself: the softmax is 0/0,"
        " and which kernel hides it is chance"
    )
    OVERFLOWED = "logits of {observed:# token} are not finite, given as trained on"
    NONFINITE = (
        "logits of {observed:# token} are not finite, {setting}[[ under {attention}]] ({settings} of {total:# setting})"
    )
    DEPENDENT = (
        "logits {setting}[[ under {attention}]] are not those of the same tokens alone[[, at {where}]]"
        " ({settings} of {total:# setting})[[; rows hold {packed:# packed sequence}, told apart by their positions,"
        " that see each other]]"
    )


@dataclass(frozen=True, kw_only=True)
class ContextIndependence(Invariant):
    """Rows give the same logits alone, in their batch, in their pack, padded on either side, and under eager attention.

    Distances of logits are relative to their norm, both centred over the vocabulary; the largest of all tokens counts.
    Weights in half precision are compared in a float32 copy, wherever there is room for one.
    """

    float32_limit: float = 5e-4
    """In float32. Measured 2e-7 to 7e-7 for seven architectures of two to six layers, 1.1 for packs whose sequences see
    each other; deep models on a GPU come to some 1e-5."""

    tf32_limit: float = 3e-2
    """In tf32, whose products keep 10 bits where bfloat16's keep 7: as for float16."""

    float16_limit: float = 3e-2
    """In float16, 11 bits: an eighth of bfloat16's distance, with room for a deep model."""

    bfloat16_limit: float = 0.15
    """In bfloat16, 8 bits. Measured 4e-3 to 1.1e-2 on two layers; packs whose sequences see each other stay near 1."""

    rotary_rtol: float = 1e-4
    """Relative distance of a rotary frequency from what the architecture computes. Float32 comes to 1e-6, bfloat16 to
    4e-3, also where it was cast back afterwards."""

    code: ClassVar[str] = "A9"

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Look at buffers and masks, then at each comparison; the first that fails speaks for the others."""
        if (seen := record.context) is None:
            yield self.not_looked(record, "context")
            return
        yield from self._rotary(seen)
        yield from self._finite(seen)
        if seen.left_out:
            if not seen.rotary:
                yield self.not_evaluated(General.INAPPLICABLE, why=seen.left_out, required=False)
            return
        if not (len(seen.comparisons) == seen.asked >= 1):
            yield self.not_evaluated(Reason.NOT_ALL_COMPARED, made=len(seen.comparisons), asked=seen.asked)
        # no limit for a type means that nothing passes in it
        limit: float = getattr(self, f"{seen.arithmetic}_limit", 0.0)
        far = [c for c in seen.comparisons if not c.max_change <= limit]
        if far:
            yield self.failed(Reason.DEPENDENT, observed=far[0].max_change, limit=limit, **_first(far, seen))

    def _rotary(self, seen: ContextRecord) -> Iterator[Finding]:
        yield from self.forbid(Reason.LOW_ROTARY, seen.low_rotary)
        if not seen.rotary_error <= self.rotary_rtol:
            yield self.failed(Reason.OTHER_ROTARY, observed=seen.rotary_error, limit=self.rotary_rtol)

    def _finite(self, seen: ContextRecord) -> Iterator[Finding]:
        if seen.blind_queries:
            yield self.failed(Reason.BLIND, observed=seen.blind_queries, limit=0)
        if seen.overflowed:
            yield self.failed(Reason.OVERFLOWED, observed=seen.overflowed, limit=0)
        bad = [c for c in seen.comparisons if c.nonfinite]
        if bad:
            yield self.failed(Reason.NONFINITE, observed=bad[0].nonfinite, limit=0, **_first(bad, seen))


def _first(bad: list[ComparisonRecord], seen: ContextRecord) -> dict[str, Any]:
    """Evidence of the first of the comparisons `bad`, which speaks for the others."""
    first, counts = bad[0], {"settings": len(bad), "total": len(seen.comparisons)}
    packed = first.packed if first.setting == "as trained on" and first.packed else None
    return {"setting": first.setting, "attention": first.attention, "where": first.where, "packed": packed} | counts
