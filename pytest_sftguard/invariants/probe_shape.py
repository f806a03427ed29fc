"""A11: the guard's own look at the finished model could have seen a NaN, and saw none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard.records import FinitenessRecord, RunRecord
from pytest_sftguard.verdicts import Finding, Invariant


@dataclass(frozen=True, kw_only=True)
class ProbeShape(Invariant):
    """The finished models were asked with enough tokens, with padding in front, and with attention written out.

    Fused attention on a CPU turns NaN into zeros below 16 query tokens, and a row without padding never shows what a
    fully masked query becomes: logits that are finite prove nothing there.
    """

    min_tokens: int = 16
    """Least number of tokens in a row: from 16 query tokens on, the CPU's kernel of sdpa lets NaN through."""

    code: ClassVar[str] = "A11"
    asks_for: ClassVar[tuple[str, ...]] = ("round_trip",)

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Look at the batch, and at what came of it."""
        seen = record.round_trip.finiteness if record.round_trip else None
        if seen is None or not (seen.rows >= 1 and seen.logits >= 1):
            yield self.not_evaluated("the finished models were not asked for logits")
            return
        if not seen.tokens >= self.min_tokens:
            yield self.failed(
                f"the finished models were asked with {seen.tokens} tokens a row",
                observed=seen.tokens, limit=self.min_tokens,
            )  # fmt: skip
        yield from self._circumstances(seen)
        if seen.nonfinite != 0:
            yield self.failed(
                f"{seen.nonfinite} of {seen.logits} logits of the finished models are not finite",
                observed=seen.nonfinite, limit=0,
            )  # fmt: skip

    def _circumstances(self, seen: FinitenessRecord) -> Iterator[Finding]:
        if not seen.padded_rows >= 1:
            why = seen.unpadded or "no row of the batch had padding in front"
            yield self.not_evaluated(why, required=not seen.unpadded)
        if seen.attention != "eager":
            why = seen.not_eager or "attention was not written out"
            yield self.not_evaluated(why, required=not seen.not_eager)
