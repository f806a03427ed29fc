"""C1: how the batch is split into micro-batches makes no difference to what a step learns."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard import verdicts
from pytest_sftguard.invariants._comparing import MOST_IN, PIECEMEAL, ComparingSplits, both_skipped, gap, randomness
from pytest_sftguard.records import RunRecord
from pytest_sftguard.verdicts import Finding


class Reason(verdicts.Reason):
    """Why another batch split may learn something else."""

    UNSHIFTED_LABELS = (
        "the loss of step 1 is divided by {labels:# label}, {unpredicted} of them at the first position of a row, where"
        " nothing predicts them"
    )
    NOT_LOOKED = "the forward passes of the first step were not seen"
    NO_MEAN = "the loss of step 1 is {observed:.6g} in {cell}, where the mean over its labels is {limit:.6g}"
    ADDED_UP = (
        "the loss of step 1 is {observed:.6g} in {cell} and {limit:.6g} in {reference}: the losses of the micro-batches"
        " are added up, and nothing divides them"
    )
    DIFFERS = (
        "the {name} of step {step} is {ours:.6g} in {cell} and {theirs:.6g} in {reference}, another batch split of the"
        f" same rows{MOST_IN}"
    )
    REFERENCE_WRONG = (
        f"{DIFFERS}; here it is the mean over all labels, and in {{reference}} it is not: that one is wrong"
    )
    NOT_ACCUMULATED = f"{DIFFERS}; nothing is accumulated in this cell"
    OWN_LOSS = f"{DIFFERS}; it is no mean over labels, and only its author can say whether it may depend on the split"


@dataclass(frozen=True, kw_only=True)
class BatchSplitEquivalence(ComparingSplits):
    """The first step's loss and gradients are those of the same rows in another batch split.

    The gradients are the sharper of the two: a mean of means moves their norm by 0.11, and the loss by 0.0019.
    """

    code: ClassVar[str] = "C1"
    reference: ClassVar[str] = "batch_split"
    differs: ClassVar[Reason] = Reason.DIFFERS

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Look at what the loss is divided by, then compare the first step of the two splits."""
        yield from self._divisor(record)
        yield from super().check(record, reference)

    def _divisor(self, record: RunRecord) -> Iterator[Finding]:
        """A loss that is divided by labels which nothing predicts is too low in every split alike."""
        first = record.first_step
        if self.average(record) in (None, "mean") or first is None:
            return
        loss, tokens = record.steps[0].loss, sum(first.micro_tokens)
        if loss is None or first.token_loss is None or first.labels is None or first.labels == tokens:
            return
        if gap(loss * first.labels, first.token_loss * tokens) <= self.token_rtol:
            seen = {"labels": first.labels, "unpredicted": first.labels - tokens}
            yield self.failed(Reason.UNSHIFTED_LABELS, step=1, observed=loss, limit=first.token_loss, **seen)

    def compare(self, record: RunRecord, reference: RunRecord) -> Iterator[Finding]:
        """Compare the first step, or hold it against its own labels where nothing else can be compared."""
        random = randomness(record, reference)
        if random == "unknown":
            yield self.not_evaluated(Reason.NOT_LOOKED)
        elif obstacle := self.other_rows(record, reference) or self.drawing(record, reference, "loss"):
            yield self._alone(record, reference, obstacle)
        else:
            findings = list(self._step(record, reference, gradients=not random))
            yield from findings or self.even(record, reference)

    def _alone(self, record: RunRecord, reference: RunRecord, obstacle: Finding) -> Finding:
        """Where the runs cannot be compared, each can still be held against the labels of its own first step."""
        ours, theirs = record.steps[0].loss, reference.steps[0].loss
        own, other = (self.average(r) for r in (record, reference))
        # a mean of means may be meant so, as that of rows one by one: it is wrong where another split has the mean
        wrong = own == "sum of means" or (own in ("mean of means", "other") and other == "mean")
        if wrong and record.first_step is not None:
            limit = record.first_step.token_loss
            return self.failed(Reason.NO_MEAN, step=1, observed=ours, limit=limit, cell=record.cell)
        if (
            own != "mean"
            and ours is not None
            and theirs is not None
            and self._in_ratio(ours, theirs, record, reference)
        ):
            cells = {"cell": record.cell, "reference": reference.cell}
            return self.failed(Reason.ADDED_UP, step=1, observed=ours, limit=theirs, **cells)
        return obstacle

    def _step(self, record: RunRecord, reference: RunRecord, gradients: bool) -> Iterator[Finding]:
        """Compare the first step that either took; the loss of the first one is there in any case."""
        of_loss, of_norm = self.usual_rtols(record, reference)
        yield from self.value("loss", of_loss, record, reference)
        pairs = zip(record.steps, reference.steps, strict=False) if gradients else ()
        for step, (ours, theirs) in enumerate(pairs, 1):
            if self.other_rows(record, reference, step):
                return
            if "skipped_by_scaler" not in (ours.effect, theirs.effect):
                yield from self.value("grad_norm", of_norm, record, reference, step)
            # once either run took a step, the weights differ
            if not both_skipped(ours, theirs):
                return

    def excuse(self, ours: float, theirs: float, record: RunRecord, reference: RunRecord) -> Reason | None:
        """Why two splits may differ without this cell being wrong; None where there is no such reason.

        An auxiliary term over the micro-batch, such as a router's, is no mean over labels, and neither is a loss that
        holds rows against each other. Of two splits of which one
        has the mean over all labels, the other is wrong; without knowing, it is the one that accumulates.
        """
        own, other = (self.average(r) for r in (record, reference))
        finite = math.isfinite(ours) and math.isfinite(theirs)
        if not finite or own in PIECEMEAL or (own == other == "mean") or (own == "other" and other == "mean"):
            return None
        if own == "mean":
            return Reason.REFERENCE_WRONG
        if own is None and record.gradient_accumulation_steps == 1:
            return Reason.NOT_ACCUMULATED
        return Reason.OWN_LOSS if self._own_loss(record, reference) else None

    def _own_loss(self, record: RunRecord, reference: RunRecord) -> bool:
        """Whether the first losses of the two differ, and not by their numbers of micro-batches.

        Then gradients differ as well, by any factor: a term that each micro-batch adds, such as AdaLoRA's, may be
        nearly all of them.
        """
        ours, theirs = record.steps[0].loss, reference.steps[0].loss
        if ours is None or theirs is None or gap(ours, theirs) <= self.usual_rtols(record, reference)[0]:
            return False
        return not any(self._in_ratio(*pair, record, reference) for pair in ((ours, theirs), (theirs, ours)))

    def _in_ratio(self, ours: float, theirs: float, record: RunRecord, reference: RunRecord) -> bool:
        """Whether the two stand in the ratio of their numbers of micro-batches, this cell adding up several."""
        counts = [len(r.steps[0].micro_losses) for r in (record, reference)]
        if counts[0] < 2 or counts[0] == counts[1] or not all(counts):
            return False
        return gap(ours * counts[1], theirs * counts[0]) <= self.scale_rtol
