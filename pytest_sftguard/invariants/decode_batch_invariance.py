"""D8: an answer does not depend on who is asked beside."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from pytest_sftguard import verdicts
from pytest_sftguard.records import DecodingRecord, DifferenceRecord, RunRecord
from pytest_sftguard.verdicts import Finding, Invariant


class Reason(verdicts.Reason):
    """How an answer depends on the batch that it is generated in."""

    TOO_FEW = "{prompts:# prompt} cannot make a batch"
    NOT_REPEATED = "two forward passes of one batch in evaluation mode do not give the same bits"
    ANSWERS = (
        "a batch changes the answers to {differing} of {prompts:# prompt} ({prompt!r}: {alone!r} alone, {batched!r} in"
        " the batch)"
    )
    SCORES_NOT_COMPARED = "the scores of the answers were not compared"
    SCORES = "scores of generated tokens are others in a padded batch than alone"


@dataclass(frozen=True, kw_only=True)
class DecodeBatchInvariance(Invariant):
    """Greedy answers in a padded batch are those at batch size 1, but for near ties, and forward passes repeat.

    Weights in half precision are compared in a float32 copy, wherever there is room for one; a target's own `generate`
    is judged in the precision of the cell.
    """

    float32_margin: float = 1e-3
    """Distance of the two best scores, relative to the largest, below which rounding may decide in float32. Scores
    themselves were measured to differ by 1e-6."""
    low_margin: float = 5e-2
    """The same in tf32, float16 and bfloat16, whose scores differ by up to 1e-2."""
    float32_limit: float = 1e-3
    """Largest distance of the scores of a token, relative to their norm, in float32. Measured 4e-7 to 2e-6; 0.5 and
    more where padding follows the prompt."""
    low_limit: float = 0.25
    """The same in tf32, float16 and bfloat16; measured 1e-2 in bfloat16 on two layers."""

    code: ClassVar[str] = "D8"
    required: ClassVar[bool] = False

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Look at the answers, then at the scores that they came from."""
        seen = record.decoding
        if seen is None:
            yield self.not_looked(record, "decoding")
            return
        if not seen.prompts >= 2:
            yield self.not_evaluated(Reason.TOO_FEW, required=True, prompts=seen.prompts)
        if not seen.repeated:
            yield self.failed(Reason.NOT_REPEATED)
        exact = seen.arithmetic == "float32"
        yield from self._answers(seen, self.float32_margin if exact else self.low_margin)
        if not seen.own:
            yield from self._scores(seen, self.float32_limit if exact else self.low_limit)

    def _answers(self, seen: DecodingRecord, margin: float) -> Iterator[Finding]:
        wrong = [d for d in seen.differences if not _is_tie(d, margin)]
        if wrong:
            first = wrong[0]
            texts: dict[str, Any] = {"prompt": first.prompt[-60:], "alone": first.alone[:60]}
            texts |= {"batched": first.batched[:60], "differing": len(wrong), "prompts": seen.prompts}
            yield self.failed(Reason.ANSWERS, observed=first.margin, limit=margin, **texts)

    def _scores(self, seen: DecodingRecord, limit: float) -> Iterator[Finding]:
        if seen.max_change is None:
            yield self.not_evaluated(Reason.SCORES_NOT_COMPARED, required=True)
        elif not seen.max_change <= limit:
            yield self.failed(Reason.SCORES, observed=seen.max_change, limit=limit)


def _is_tie(difference: DifferenceRecord, margin: float) -> bool:
    return difference.margin is not None and 0 <= difference.margin <= margin
