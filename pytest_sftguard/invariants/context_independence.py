"""A9: what the model says of a token depends on the tokens before it in its own row, and on nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard.records import ComparisonRecord, ContextRecord, RunRecord
from pytest_sftguard.verdicts import Finding, Invariant


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
        """Look at buffers and masks, then at each comparison; the first that fails of a kind speaks for the others."""
        seen = record.context
        if seen is None:
            yield self.not_looked(record, "context")
            return
        yield from self._rotary(seen)
        yield from self._finite(seen)
        if seen.left_out:
            if not seen.rotary:
                yield self.not_evaluated(seen.left_out, required=False)
            return
        if not (len(seen.comparisons) == seen.asked >= 1):
            yield self.not_evaluated(f"{len(seen.comparisons)} of {seen.asked} comparisons of rows are there")
        yield from self._distances(seen)

    def _rotary(self, seen: ContextRecord) -> Iterator[Finding]:
        if seen.low_rotary:
            yield self.failed(
                f"rotary frequencies are kept in half precision, which cannot tell positions above 256 apart:"
                f" {seen.low_rotary}",
                observed=seen.low_rotary.count, limit=0,
            )  # fmt: skip
        if not seen.rotary_error <= self.rotary_rtol:
            yield self.failed(
                "rotary frequencies are not those that the architecture computes",
                observed=seen.rotary_error, limit=self.rotary_rtol,
            )  # fmt: skip

    def _finite(self, seen: ContextRecord) -> Iterator[Finding]:
        if seen.blind_queries:
            yield self.failed(
                f"{seen.blind_queries} rows of the given attention masks let a token see nothing, not even itself:"
                " their softmax is 0/0, and which kernel hides it is chance",
                observed=seen.blind_queries, limit=0,
            )  # fmt: skip
        if seen.overflowed:
            yield self.failed(
                f"logits of {seen.overflowed} tokens are not finite, given as trained on",
                observed=seen.overflowed, limit=0,
            )  # fmt: skip
        bad = [c for c in seen.comparisons if c.nonfinite]
        if bad:
            yield self.failed(
                f"logits of {bad[0].nonfinite} tokens are not finite, {_setting(bad[0])}"
                f" ({len(bad)} of {len(seen.comparisons)} settings)",
                observed=bad[0].nonfinite, limit=0,
            )  # fmt: skip

    def _distances(self, seen: ContextRecord) -> Iterator[Finding]:
        limit = {
            "float32": self.float32_limit,
            "tf32": self.tf32_limit,
            "float16": self.float16_limit,
            "bfloat16": self.bfloat16_limit,
        }.get(seen.arithmetic, 0.0)
        far = [c for c in seen.comparisons if not c.max_change <= limit]
        if far:
            yield self.failed(
                f"logits {_setting(far[0])} are not those of the same tokens alone, at {far[0].where}"
                f" ({len(far)} of {len(seen.comparisons)} settings){_packs(far[0])}",
                observed=far[0].max_change, limit=limit,
            )  # fmt: skip


def _setting(comparison: ComparisonRecord) -> str:
    return f"{comparison.setting}" + (f" under {comparison.attention}" if comparison.attention else "")


def _packs(comparison: ComparisonRecord) -> str:
    if not comparison.packed or comparison.setting != "as trained on":
        return ""
    return "; rows hold several sequences, told by their positions or by a BOS inside, that see each other"
