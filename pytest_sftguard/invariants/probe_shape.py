"""A11: the guard's own look at the finished model could have seen a NaN, and saw none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard import verdicts
from pytest_sftguard.invariants._reloaded import not_reloaded
from pytest_sftguard.records import RunRecord
from pytest_sftguard.verdicts import Finding, Invariant


class Reason(verdicts.Reason):
    """Why the look at the finished models proves nothing, or what it found."""

    NOT_SEEN = "the finished models were not asked for logits"
    SHORT = "the finished models were given {observed:# token} a row"
    UNPADDED = "no row of the batch had padding in front[[: {why}]]"
    NOT_EAGER = "attention was {attention}, not eager[[: {why}]]"
    NONFINITE = "{observed} of {logits:# logit} of the finished models were not finite"


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
        if broken := not_reloaded(self, record):
            yield broken
            return
        if seen is None or not (seen.rows >= 1 and seen.logits >= 1):
            yield self.not_evaluated(Reason.NOT_SEEN)
            return
        if seen.tokens is not None and not seen.tokens >= self.min_tokens:
            yield self.failed(Reason.SHORT, observed=seen.tokens, limit=self.min_tokens)
        if not seen.padded_rows >= 1:
            yield self.not_evaluated(Reason.UNPADDED, required=not seen.unpadded, why=seen.unpadded)
        if seen.attention != "eager":
            why = seen.not_eager
            yield self.not_evaluated(Reason.NOT_EAGER, required=not why, attention=seen.attention, why=why)
        if seen.nonfinite != 0:
            yield self.failed(Reason.NONFINITE, observed=seen.nonfinite, limit=0, logits=seen.logits)
