"""D12: a greedy answer is what the model's own scores say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard import verdicts
from pytest_sftguard.records import RunRecord
from pytest_sftguard.verdicts import Finding, Invariant

_LOOKS = ("continuing", "following")


class Reason(verdicts.Reason):
    """How an answer is not what the scores say, or why that is not known."""

    OTHER_TOKENS = (
        "{other} of {tokens:# generated token} had not the best score: {prompt!r} is answered with {token!r} at place"
        " {place}, where one forward pass prefers {best!r}[[ by {observed:.3g} of the largest score]]"
    )
    UNSCORED = "the scores of {unscored:# generated token} are not finite"
    NOTHING = "no generated token was compared"


@dataclass(frozen=True, kw_only=True)
class GenerationFollowsLogits(Invariant):
    """Each token of a greedy answer has the best score in one forward pass over prompt and answer, near ties aside.

    Penalties and suppressed tokens of the generation_config are applied to the scores. What fails changes scores or
    tokens within `generate`, or reads its cache wrongly.
    """

    float32_margin: float = 1e-3
    """Distance below the best score, relative to the largest, below which rounding may decide in float32. Scores with
    and without a cache were measured to differ by 1e-6."""
    low_margin: float = 5e-2
    """The same in tf32, float16 and bfloat16, whose scores differ by up to 1e-2."""

    code: ClassVar[str] = "D12"
    required: ClassVar[bool] = False

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Look at the token that is farthest below the best one."""
        seen = record.following
        if seen is None:
            yield self.not_looked(record, _asked(record))
            return
        margin = self.float32_margin if seen.arithmetic == "float32" else self.low_margin
        if not seen.tokens >= 1:
            yield self.not_evaluated(Reason.NOTHING, required=True)
        if seen.unscored:
            yield self.not_evaluated(Reason.UNSCORED, required=True, unscored=seen.unscored)
        if seen.other and (seen.below is None or not seen.below <= margin):
            yield self.failed(
                Reason.OTHER_TOKENS,
                observed=seen.below,
                limit=margin,
                other=seen.other,
                tokens=seen.tokens,
                prompt=seen.prompt[-60:],
                place=seen.place,
                token=seen.token,
                best=seen.best,
            )


def _asked(record: RunRecord) -> str:
    """The look that should have filled the record: one that broke, or else the last that was asked for."""
    asked = [look for name in _LOOKS if (look := record.look(name)) is not None]
    broken = [look for look in asked if look.error]
    return next((look.name for look in (*broken, *asked)), _LOOKS[-1])
