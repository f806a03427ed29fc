"""What the invariants that compare two runs share: why runs cannot be compared, and the numbers of one step."""

from __future__ import annotations

import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pytest_sftguard import verdicts
from pytest_sftguard.precision import MODES, mode_named
from pytest_sftguard.records import Names, RunRecord, StepRecord
from pytest_sftguard.verdicts import Finding, General, Invariant


class Both(verdicts.Reason):
    """What is said of any two runs."""

    STEPS = "it took {limit:# step}, and {observed:# step} in the {name} reference"
    NOT_SEEN = "the {name} of step {step} was not seen"
    ROWS_NOT_KNOWN = "which rows step {step} saw is not known: its batches hold no token ids"
    OTHER_ROWS = (
        "step {step} saw other rows than in {reference}: the order of the data, or what the collator makes of it,"
        " depends on more than the seed"
    )
    RANDOM = "the model draws random numbers in training, such as dropout, and those of {reference} are others"
    EVEN = "every micro-batch of step 1 has the same number of labels, so that a mean of their means looks the same"
    NOT_DIGESTED = "the trained adapter was not digested"
    ADAPTERS = "the trained adapters differ, though the numbers of every step are the same"


@dataclass(frozen=True, kw_only=True)
class Comparing(Invariant, ABC):
    """Base of the invariants that hold a run against another run of the same training."""

    judges_reference_alone: ClassVar[bool] = False
    """Whether the other run is judged by itself, so that no step of the cell's own need have been seen."""

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Compare the runs, where the other one came to its end and steps were seen."""
        if missing := self.not_compared(reference):
            yield missing
        elif reference is not None and reference.steps and (record.steps or self.judges_reference_alone):
            yield from self.compare(record, reference)
        else:
            yield self.not_evaluated(General.NO_STEP)

    @abstractmethod
    def compare(self, record: RunRecord, reference: RunRecord) -> Iterator[Finding]:
        """Yield what is wrong, or what cannot be compared, of runs that took a step each."""

    def unseen(self, step: StepRecord, *names: str) -> Finding | None:
        """The finding where one of these numbers of `step` was not seen."""
        missing = next((n for n in names if getattr(step, n) is None), "")
        return self.not_evaluated(Both.NOT_SEEN, name=missing, step=step.step) if missing else None

    def other_length(self, record: RunRecord, reference: RunRecord) -> Finding | None:
        """The finding where the runs took different numbers of steps."""
        ours, theirs = len(record.steps), len(reference.steps)
        return None if ours == theirs else self.failed(Both.STEPS, observed=theirs, limit=ours, name=self.reference)

    def other_rows(self, record: RunRecord, reference: RunRecord, step: int = 1) -> Finding | None:
        """The finding where the runs may not have seen the same rows at `step`, counted from 1."""
        ours, theirs = record.steps[step - 1].rows, reference.steps[step - 1].rows
        if ours is None or theirs is None:
            return self.not_evaluated(Both.ROWS_NOT_KNOWN, required=False, step=step)
        if ours != theirs:
            return self.not_evaluated(Both.OTHER_ROWS, required=False, step=step, reference=reference.cell)
        return None

    def drawing(self, record: RunRecord, reference: RunRecord, *where: str) -> Finding | None:
        """The finding where random numbers reach what one of `where` says, see `randomness`."""
        if randomness(record, reference) not in where:
            return None
        return self.not_evaluated(Both.RANDOM, required=False, reference=reference.cell)

    def adapters(self, record: RunRecord, reference: RunRecord) -> Iterator[Finding]:
        """Compare the trained adapters, which should be the same bits."""
        if not record.adapter_digest or not reference.adapter_digest:
            yield self.not_evaluated(Both.NOT_DIGESTED)
        elif record.adapter_digest != reference.adapter_digest:
            yield self.failed(Both.ADAPTERS)


CARRIED = 15.0
"""The norm of all gradients may differ by this many times as much as that of half of the tensors. In a model whose
residual stream has massive activations, as in Llama's family, a handful of tensors carry it: in SmolLM2 a bfloat16 norm
was 0.47 off from float32's on two rows, where half of the 210 tensors were off by 0.008 or less."""

MOST_IN = (
    "[[; the gradients of half of the {compared:# tensor} differ by {median:.2g} or more, most of all that of {worst}]]"
)
"""End of the sentence about a value that differs: what is known of the single tensors."""


@dataclass(frozen=True, kw_only=True)
class ComparingSteps(Comparing):
    """Base of the invariants that compare the loss and the gradients of one step of each run."""

    loss_rtol: float | None = None
    """Largest difference of the first losses, as a share; None: the tolerance of the cell's precision."""
    grad_norm_rtol: float | None = None
    """Largest difference of the first gradients' norms in more than half of the tensors, as a share, and a fifteenth of
    that of the norm of all; None: the tolerance of the cell's precision."""

    differs: ClassVar[verdicts.Reason]
    """The invariant's own reason where a value differs: `name` has `ours` in `cell`, and `theirs` in `reference`."""

    def excuse(self, ours: float, theirs: float, record: RunRecord, reference: RunRecord) -> verdicts.Reason | None:
        """Why the two values may differ without the cell being wrong; None where there is no such reason."""
        return None

    def value(
        self, name: str, usual_rtol: float, record: RunRecord, reference: RunRecord, step: int = 1
    ) -> Iterator[Finding]:
        """Compare `name`, the `loss` or the `grad_norm` of a step, counted from 1, that neither run skipped.

        Of gradients more than half of the tensors must agree within the tolerance, which is `usual_rtol` where the
        user gave none, and the norm of all within `CARRIED` times as much; that norm within the tolerance itself where
        nothing is known of the tensors.
        """
        steps = record.steps[step - 1], reference.steps[step - 1]
        if unseen := self.unseen(steps[0], name) or self.unseen(steps[1], name):
            yield unseen
            return
        ours, theirs = (getattr(s, name) for s in steps)
        given = getattr(self, f"{name}_rtol")
        rtol = usual_rtol if given is None else given
        shares = _of_tensors(record, reference) if name == "grad_norm" else {}
        seen: dict[str, Any] = {"name": name, "ours": ours, "theirs": theirs}
        seen |= {"cell": record.cell, "reference": reference.cell}
        share, limit = gap(ours, theirs), CARRIED * rtol if shares else rtol
        if share <= limit and shares:
            known = not any(map(math.isnan, shares.values()))
            share, limit = statistics.median_high(shares.values()) if known else math.nan, rtol
            worst = max(shares, key=lambda n: (math.isnan(shares[n]), shares[n]))
            seen |= {"compared": len(shares), "median": share, "worst": Names.of([worst])}
        if share <= limit:
            return
        if excuse := self.excuse(ours, theirs, record, reference):
            yield self.not_evaluated(excuse, required=False, step=steps[0].step, **seen)
        else:
            yield self.failed(self.differs, step=steps[0].step, observed=share, limit=limit, **seen)


Average = Literal["mean", "mean of means", "sum of means", "other"]
PIECEMEAL = ("mean of means", "sum of means")


@dataclass(frozen=True, kw_only=True)
class ComparingSplits(ComparingSteps):
    """Base of the invariants that compare the same rows, divided otherwise into micro-batches or among processes."""

    piecemeal_rtol: float = 1e-3
    """Largest difference of the losses where that of one run is a mean or a sum of its micro-batches' means, as its own
    logits tell: a mean of means is 0.0019 off, which the roundings of a deep model in bfloat16 come near to."""
    token_rtol: float = 2e-5
    """Largest difference, as a share, between a loss and the mean over all labels of the step, computed from the
    logits, for it to count as that mean. Measured up to 3e-6 in all modes; an auxiliary term of 0.001 is 4e-4."""
    scale_rtol: float = 0.05
    """How closely two losses stand in the ratio of their numbers of micro-batches, or of processes, to have been added
    up and not divided: they differ from it by what the split moves them, 0.02 for very uneven rows."""

    def average(self, record: RunRecord) -> Average | None:
        """What the first step's loss is of the losses of its labels; None where that is not known.

        Their mean, the mean of the micro-batches' means, the sum of those, or something else, such as a mean with a
        term beside it.
        """
        first, loss = record.first_step, record.steps[0].loss if record.steps else None
        if first is None or first.token_loss is None or loss is None or not first.micro_token_losses:
            return None
        total = math.fsum(first.micro_token_losses)
        of_means = total / len(first.micro_token_losses)
        known: dict[Average, float] = {"mean": first.token_loss, "mean of means": of_means, "sum of means": total}
        return next((name for name, value in known.items() if gap(loss, value) <= self.token_rtol), "other")

    def usual_rtols(self, record: RunRecord, reference: RunRecord) -> tuple[float, float]:
        """How closely the first loss and the norm of its gradients agree in two splits of the same rows, as shares.

        Where one of them alone computed its products in tf32, whatever was asked for, as closely as tf32 and float32
        do: that it was so is for `precision_is_real` to report. Where the loss of either is a mean or a sum of its
        micro-batches' means, no rounding excuses more than `piecemeal_rtol`.
        """
        allowed = mode_named(record.precision).agreement
        of_loss, of_norm = allowed.split_loss_rtol, allowed.split_grad_norm_rtol
        if {record.tf32, reference.tf32} == {True, False}:
            of_loss, of_norm = MODES["tf32"].agreement.fp32_loss_rtol, MODES["tf32"].agreement.fp32_grad_norm_rtol
        if any(self.average(r) in PIECEMEAL for r in (record, reference)):
            of_loss = min(of_loss, self.piecemeal_rtol)
        return max(of_loss, 2 * resolution(record, reference)), of_norm

    def even(self, *records: RunRecord) -> Iterator[Finding]:
        """Say so where all micro-batches of the first step had equal numbers of labels."""
        counts = [r.first_step.micro_tokens if r.first_step is not None else () for r in records]
        if all(counts) and all(len(set(c)) == 1 for c in counts):
            yield self.not_evaluated(Both.EVEN, required=False)


def gap(one: float, other: float, floor: float = 0.0) -> float:
    """By how much two numbers differ, as a share of the larger, or of `floor`; NaN where one of them is no number."""
    if not (math.isfinite(one) and math.isfinite(other)):
        return math.nan
    largest = max(abs(one), abs(other), floor)
    return abs(one - other) / largest if largest else 0.0


def resolution(*records: RunRecord) -> float:
    """The rounding error of the first step's losses, as a share: 2**-8 where all are bfloat16 numbers, else about 0.

    A loss that is computed in half precision can only be held to that. A float32 number is one by chance once in 2**16.
    """
    losses = [loss for r in records for s in r.steps[:1] for loss in s.micro_losses if math.isfinite(loss) and loss]
    for bits in (8, 11):
        if losses and all((math.frexp(loss)[0] * 2**bits).is_integer() for loss in losses):
            return 2.0**-bits
    return 0.0


def same(one: float | None, other: float | None) -> bool:
    """Whether two numbers are the same, bit for bit but for the sign of zero; NaN is the same as NaN here."""
    if one is None or other is None:
        return one is other
    return one == other or (math.isnan(one) and math.isnan(other))


def same_bits(name: str, ours: StepRecord, theirs: StepRecord) -> bool:
    """Whether the number `name` of two steps is the same; NaN is the same as NaN in the gradients that both skipped."""
    one, other = getattr(ours, name), getattr(theirs, name)
    return one == other or (name == "grad_norm" and both_skipped(ours, theirs) and same(one, other))


def randomness(record: RunRecord, reference: RunRecord) -> str:
    """Where the forward passes of either run draw random numbers that reach the loss, or the gradients alone.

    Empty: nowhere; `gradients`: in the dropout before factors that a second factor of zero shields the loss from;
    `loss`: anywhere else; `unknown`: it was not seen.
    """
    seen = [r.first_step.random if r.first_step is not None else None for r in (record, reference)]
    if None in seen:
        return "unknown"
    if "model" in seen:
        return "loss"
    if "adapter" in seen:
        return "gradients" if _starts_at_zero(record) else "loss"
    return ""


def _starts_at_zero(record: RunRecord) -> bool:
    """Whether each second factor was zero, so that what goes into the first one reaches no loss."""
    second = [t for t in record.adapter if "lora_B" in t.name.split(".") or "lora_embedding_B" in t.name.split(".")]
    return bool(second) and all(t.initial_norm == 0 for t in second)


_SMALL = 1e-3
"""Share of the largest gradient below which another is taken for a sum that cancels, as that of a key's bias is."""


def _of_tensors(record: RunRecord, reference: RunRecord) -> dict[str, float]:
    """By how much the norms of each tensor's first gradient differ, where one is not 0; empty where a run knows none.

    A gradient that is there in one run alone differs by all of it.
    """
    ours, theirs = ({t.name: t.first_gradient_norm for t in r.adapter} for r in (record, reference))
    known = [[n for n in norms.values() if n is not None] for norms in (ours, theirs)]
    if not all(known):
        return {}
    floor = _SMALL * max(n for norms in known for n in norms)
    pairs = {n: (ours.get(n) or 0.0, theirs.get(n) or 0.0) for n in ours | theirs}
    return {n: gap(one, other, floor) for n, (one, other) in pairs.items() if one or other}


def both_skipped(one: StepRecord, other: StepRecord) -> bool:
    """Whether a loss scaler kept both runs from taking the step."""
    return one.effect == other.effect == "skipped_by_scaler"


def exact(*records: RunRecord) -> bool:
    """Whether the runs can be held to the same bits: on a CPU, by one thread."""
    return all(r.device.device_type == "cpu" and r.device.threads == 1 for r in records)


def moved(record: RunRecord) -> dict[str, float]:
    """How far all `lora_A`, all `lora_B` and all `other tensors` moved from their start, in L2 norm."""
    squares: dict[str, float] = {}
    for t in record.adapter:
        factor = next((p for p in t.name.split(".") if p in ("lora_A", "lora_B")), "other tensors")
        delta = math.nan if t.delta_norm is None else t.delta_norm
        squares[factor] = squares.get(factor, 0.0) + delta * delta
    return {factor: total**0.5 for factor, total in squares.items()}
