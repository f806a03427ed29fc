"""A13: the loss depends on the places that have a label, and on no others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard import verdicts
from pytest_sftguard.records import FootprintRecord, RunRecord
from pytest_sftguard.verdicts import Finding, General, Invariant


class Reason(verdicts.Reason):
    """Where the loss looks, and should not, or does not look, and should."""

    OTHER_SHIFT = (
        "the loss compares each label with the prediction {taken:# place} before it, not {wanted:# place} before it:"
        " labels are the input tokens, and the model is to predict the next one"
    )
    OTHER_PLACE = (
        "the loss compares each label with the prediction {taken:# place} before it, though labels are not the input"
        " tokens, and each belongs to its own place"
    )
    SILENT = (
        "{observed:# place} of {places} with a label {has} no gradient (first: {where})[[; {whole:# row} of the batch]]"
    )
    OUTSIDE = (
        "the loss depends on places without a label, {observed:.3g} times as strongly as on those with one ({where})"
    )
    PADDING = (
        "the loss depends on predictions of padding, {observed:.3g} times as strongly as on the other labels ({where})"
    )
    NOT_COMPARED = "gradients of the places were not compared"


@dataclass(frozen=True, kw_only=True)
class LossFootprint(Invariant):
    """The gradient of the last hidden state is where labels are, one place earlier if the next token is predicted."""

    max_silent: float = 0.0
    """Share of labelled places without a gradient, except for those that are known for certain. Measured 0 in healthy
    trainings, 0.25 to 0.9 where rows, or half of the tokens, do not count."""

    max_outside: float = 0.5
    """Largest gradient at a place without a label, relative to the largest at one with a label. Measured 0 in nearly
    all healthy trainings, 1e-5 with an auxiliary loss, 0.2 with weights of 0.1 on the prompt; 0.77 to 1.3 without the
    shift, over the prompt, or with -100 clamped to a token."""

    max_padding: float = 0.3
    """The same for predictions of padding. Measured at most 0.07 in healthy trainings, 0.83 to 0.93 with labels on
    it."""

    code: ClassVar[str] = "A13"

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Look for another shift first: it also leaves places silent, and others with a gradient."""
        if (seen := record.footprint) is None:
            yield self.not_looked(record, "first_batch")
            return
        if seen.error:
            yield self.not_evaluated(General.LOOK_BROKE, name="first_batch", error=seen.error, required=False)
            return
        if seen.left_out:
            yield self.not_evaluated(General.INAPPLICABLE, why=seen.left_out, required=False)
            return
        if seen.other_shift is not None:
            reason = Reason.OTHER_SHIFT if seen.shift else Reason.OTHER_PLACE
            yield self.failed(
                reason, observed=seen.other_shift, limit=seen.shift, taken=seen.other_shift, wanted=seen.shift
            )
            return
        if not (seen.places and seen.silent / seen.places <= self.max_silent):
            yield self._silent(seen)
        if seen.outside is None or seen.padding is None:
            # without any gradient there is nothing to compare
            if not seen.silent:
                yield self.not_evaluated(Reason.NOT_COMPARED)
            return
        if not seen.padding <= self.max_padding:
            where = seen.first_padding
            yield self.failed(Reason.PADDING, observed=seen.padding, limit=self.max_padding, where=where)
        elif not seen.outside <= self.max_outside:
            where = seen.first_outside
            yield self.failed(Reason.OUTSIDE, observed=seen.outside, limit=self.max_outside, where=where)

    def _silent(self, seen: FootprintRecord) -> Finding:
        return self.failed(
            Reason.SILENT,
            observed=seen.silent,
            limit=f"{self.max_silent:.0%}",
            places=seen.places,
            has="has" if seen.silent == 1 else "have",
            where=seen.first_silent,
            whole=seen.silent_rows or None,
        )
