"""C1: how the batch is cut into micro-batches makes no difference to what a step learns."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard.invariants._comparing import (
    MEAN,
    MEAN_OF_MEANS,
    OTHER,
    PIECEMEAL,
    SUM_OF_MEANS,
    apart,
    average,
    both_skipped,
    closeness,
    gap,
    other_rows,
    randomness,
    uneven,
)
from pytest_sftguard.records import RunRecord
from pytest_sftguard.verdicts import Finding, Invariant


@dataclass(frozen=True, kw_only=True)
class BatchSplitEquivalence(Invariant):
    """The first step's loss and gradients are those of the same rows in another cut."""

    loss_rtol: float | None = None
    """Largest difference of the losses, as a share; None: the tolerance of the cell's precision."""

    grad_norm_rtol: float | None = None
    """Largest difference of the gradients' norms in more than half of the tensors, as a share, and a fifteenth of that
    of the norm of all; None: the tolerance of the cell's precision. The sharper of the two: a mean of means moves the
    norm by 0.11 where it moves the loss by 0.0019."""

    piecemeal_rtol: float = 1e-3
    """Largest difference of the losses where that of one run is a mean or a sum of its micro-batches' means, as its own
    logits tell: a mean of means is 0.0019 off, which the roundings of a deep model in bfloat16 come near to."""

    token_rtol: float = 2e-5
    """Largest difference, as a share, between a loss and the mean over all labels of the step, computed from the
    logits, for it to count as that mean. Measured up to 3e-6 in all modes; an auxiliary term of 0.001 is 4e-4."""

    scale_rtol: float = 0.05
    """How closely two losses stand in the ratio of their numbers of micro-batches, to have been added up without being
    divided: they differ from it by what the cut moves them, 0.02 for very uneven rows."""

    code: ClassVar[str] = "C1"
    reference: ClassVar[str] = "batch_split"

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Look at what the loss is divided by, then compare the first step of the two cuts."""
        yield from self._divisor(record)
        if missing := self.not_compared(reference):
            yield missing
        elif reference is not None:
            yield from self._compared(record, reference)

    def _divisor(self, record: RunRecord) -> Iterator[Finding]:
        """A loss that is divided by labels which nothing predicts is too low in every cut alike."""
        first = record.first_step
        if average(record, self.token_rtol) in (None, MEAN) or first is None:
            return
        loss, tokens = record.steps[0].loss, sum(first.micro_tokens)
        if loss is None or first.token_loss is None or first.labels is None or first.labels == tokens:
            return
        if gap(loss * first.labels, first.token_loss * tokens) <= self.token_rtol:
            yield self.failed(
                f"the loss of step 1 is divided by {first.labels} labels, of which {first.labels - tokens} stand at"
                " the first position of a row, where nothing predicts them",
                step=1, observed=loss, limit=first.token_loss,
            )  # fmt: skip

    def _compared(self, record: RunRecord, reference: RunRecord) -> Iterator[Finding]:
        if not record.steps or not reference.steps:
            yield self.not_evaluated("no optimizer step was seen")
            return
        random = randomness(record, reference)
        reason = other_rows(record, reference)
        if random == "unknown":
            yield self.not_evaluated("the forward passes of the first step were not seen")
        elif reason or random == "loss":
            yield self._incomparable(record, reference, reason or "the model draws random numbers in training: dropout")
        else:
            findings = list(self._step(record, reference, gradients=not random))
            yield from findings
            if not findings and uneven(record, reference) is False:
                yield self.not_evaluated(
                    "every micro-batch of step 1 has as many labels as the others, so that a mean of their means would"
                    " look the same",
                    required=False,
                )

    def _incomparable(self, record: RunRecord, reference: RunRecord, reason: str) -> Finding:
        """Where the runs cannot be compared, each can still be held against the labels of its own first step."""
        ours, theirs = record.steps[0].loss, reference.steps[0].loss
        own, other = (average(r, self.token_rtol) for r in (record, reference))
        # a mean of means may be meant so, as that of rows one by one: it is wrong where another cut has the other mean
        wrong = own == SUM_OF_MEANS or (own in (MEAN_OF_MEANS, OTHER) and other == MEAN)
        if wrong and record.first_step is not None:
            limit = record.first_step.token_loss
            return self.failed(
                f"the loss of step 1 is no mean over its labels in {record.cell}: it is {ours:.6g}, where that mean"
                f" is {limit:.6g}",
                step=1, observed=ours, limit=limit,
            )  # fmt: skip
        if own != MEAN and ours is not None and theirs is not None and self._undivided(ours, theirs, record, reference):
            return self.failed(
                f"the loss of step 1 is {ours:.6g} in {record.cell} and {theirs:.6g} in {reference.cell}: those of the"
                " micro-batches are added up, and nothing divides them",
                step=1, observed=ours, limit=theirs,
            )  # fmt: skip
        return self.not_evaluated(reason, required=False)

    def _step(self, record: RunRecord, reference: RunRecord, gradients: bool) -> Iterator[Finding]:
        """Compare the first step that either took; the loss of the first one is there in any case."""
        of_loss, of_norm = closeness(record, reference, self.token_rtol, self.piecemeal_rtol)
        ours, theirs = record.steps[0], reference.steps[0]
        pair = ours.loss, theirs.loss
        loss_rtol = of_loss if self.loss_rtol is None else self.loss_rtol
        yield from self._value("loss", pair, loss_rtol, 1, record, reference)
        if not gradients:
            return
        for ours, theirs in zip(record.steps, reference.steps, strict=False):
            if other_rows(record, reference, ours.step):
                return
            if "skipped_by_scaler" not in (ours.effect, theirs.effect):
                pair = ours.grad_norm, theirs.grad_norm
                norm_rtol = of_norm if self.grad_norm_rtol is None else self.grad_norm_rtol
                yield from self._value("grad_norm", pair, norm_rtol, ours.step, record, reference)
            if not both_skipped(ours, theirs):
                return  # from here on the weights differ

    def _value(
        self,
        name: str,
        pair: tuple[float | None, float | None],
        rtol: float,
        step: int,
        record: RunRecord,
        reference: RunRecord,
    ) -> Iterator[Finding]:
        ours, theirs = pair
        if ours is None or theirs is None:
            yield self.not_evaluated(f"the {name} of step {step} was not seen")
            return
        far = apart(name, (ours, theirs), rtol, record, reference)
        if far is None:
            return
        message = (
            f"the {name} of step {step} is {ours:.6g} in {record.cell} and {theirs:.6g} in {reference.cell}, which cuts"
            f" the same rows in another way{far.note}"
        )
        if excuse := self._excuse(ours, theirs, record, reference):
            yield self.not_evaluated(f"{message}; {excuse}", required=False)
        else:
            yield self.failed(message, step=step, observed=far.share, limit=far.limit)

    def _excuse(self, ours: float, theirs: float, record: RunRecord, reference: RunRecord) -> str:
        """Why two cuts may differ without this cell being wrong; empty where there is no such reason.

        An auxiliary term over the micro-batch, such as a router's, is no mean over labels. Of two cuts of which one has
        the mean over all labels, the other is wrong; without knowing, it is the one that accumulates.
        """
        own, other = (average(r, self.token_rtol) for r in (record, reference))
        finite = math.isfinite(ours) and math.isfinite(theirs)
        if not finite or own in PIECEMEAL or (own == other == MEAN) or (own == OTHER and other == MEAN):
            return ""
        if own == MEAN:
            return f"in this cell it is the mean over all labels, in {reference.cell} it is not: that cut is wrong"
        if own is None:
            return "nothing is accumulated in this cell" if record.gradient_accumulation_steps == 1 else ""
        if not self._undivided(ours, theirs, record, reference):
            return "it is no mean over labels, so that its author alone can say whether it may depend on the cut"
        return ""

    def _undivided(self, ours: float, theirs: float, record: RunRecord, reference: RunRecord) -> bool:
        """Whether the two stand in the ratio of their numbers of micro-batches, this cell adding up several."""
        counts = [len(r.steps[0].micro_losses) for r in (record, reference)]
        if counts[0] < 2 or counts[0] == counts[1] or not all(counts):
            return False
        return gap(ours * counts[1], theirs * counts[0]) <= self.scale_rtol
