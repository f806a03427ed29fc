"""Two runs side by side: the numbers of one step, and why they may not be comparable."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from pytest_sftguard.precision import MODES, Agreement, mode_named
from pytest_sftguard.records import RunRecord, StepRecord


def agreement(record: RunRecord) -> Agreement:
    """The tolerances of the record's mode."""
    return mode_named(record.precision).agreement


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


def other_rows(record: RunRecord, reference: RunRecord, step: int = 1) -> str:
    """Why the two runs may not have seen the same rows at `step`, counted from 1; empty where they have."""
    ours, theirs = record.steps[step - 1].rows, reference.steps[step - 1].rows
    if ours is None or theirs is None:
        return f"which rows step {step} saw is not known: its batches hold no token ids"
    if ours != theirs:
        return (
            f"step {step} saw other rows than in {reference.cell}: the order of the data, or what the collator makes of"
            " it, depends on more than the seed"
        )
    return ""


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


MEAN, MEAN_OF_MEANS, SUM_OF_MEANS, OTHER = "mean", "mean of means", "sum of means", "other"
PIECEMEAL = (MEAN_OF_MEANS, SUM_OF_MEANS)


def average(record: RunRecord, rtol: float) -> str | None:
    """What the first step's loss is of the losses of its labels; None where that is not known.

    Their mean, the mean of the micro-batches' means, the sum of those, or something else, such as a mean with a term
    beside it.
    """
    first, loss = record.first_step, record.steps[0].loss if record.steps else None
    if first is None or first.token_loss is None or loss is None or not first.micro_token_losses:
        return None
    total = math.fsum(first.micro_token_losses)
    kinds = {MEAN: first.token_loss, MEAN_OF_MEANS: total / len(first.micro_token_losses), SUM_OF_MEANS: total}
    return next((kind for kind, value in kinds.items() if gap(loss, value) <= rtol), OTHER)


def closeness(record: RunRecord, reference: RunRecord, token_rtol: float, piecemeal_rtol: float) -> tuple[float, float]:
    """How closely the first loss and the norm of its gradients agree in two cuts of the same rows, as shares.

    Where one of them alone computed its products in tf32, whatever was asked for, as closely as tf32 and float32 do:
    that it was so is for `precision_is_real` to report. Where the loss of either is a mean or a sum of its
    micro-batches' means, as its own logits tell within `token_rtol`, no rounding excuses more than `piecemeal_rtol`.
    """
    allowed = agreement(record)
    of_loss, of_norm = allowed.split_loss_rtol, allowed.split_grad_norm_rtol
    if {record.tf32, reference.tf32} == {True, False}:
        of_loss, of_norm = MODES["tf32"].agreement.fp32_loss_rtol, MODES["tf32"].agreement.fp32_grad_norm_rtol
    if any(average(r, token_rtol) in PIECEMEAL for r in (record, reference)):
        of_loss = min(of_loss, piecemeal_rtol)
    return max(of_loss, 2 * resolution(record, reference)), of_norm


CARRIED = 15.0
"""The norm of all gradients may differ by so many times as much as that of half of the tensors. In a model whose
residual stream has massive activations, as Llama's kind has, a handful of tensors carry it: in SmolLM2 a bfloat16 norm
was 0.47 off from float32's on two rows, where half of the 210 tensors were off by 0.008 or less."""


@dataclass(frozen=True)
class Apart:
    """By how much two runs differ in something, as a share, what is allowed, and what else is to be said of it."""

    share: float
    limit: float
    note: str = ""


def apart(name: str, pair: tuple[float, float], rtol: float, record: RunRecord, reference: RunRecord) -> Apart | None:
    """Whether the two runs differ in `name`, the `loss` or the `grad_norm` of a step, of which `pair` has the numbers.

    The step is the first that neither run skipped. Of gradients more than half of the tensors must agree within `rtol`,
    and the norm of all within `CARRIED` times as much; that norm within `rtol` where nothing is known of the tensors.
    """
    whole = gap(*pair)
    shares = _of_tensors(record, reference) if name == "grad_norm" else {}
    limit = CARRIED * rtol if shares else rtol
    if not whole <= limit:
        return Apart(whole, limit)
    if not shares:
        return None
    middle = math.nan if any(map(math.isnan, shares.values())) else statistics.median_high(shares.values())
    if not middle <= rtol:
        worst = max(shares, key=lambda n: (math.isnan(shares[n]), shares[n]))
        note = f"; the gradients of half of the {len(shares)} tensors differ by {middle:.2g} or more, most in {worst}"
        return Apart(middle, rtol, note)
    return None


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


def uneven(*records: RunRecord) -> bool | None:
    """Whether micro-batches of the first step had unequal numbers of labels; None where that is not known."""
    counts = [r.first_step.micro_tokens for r in records if r.first_step is not None]
    if len(counts) != len(records) or not all(counts):
        return None
    return any(len(set(c)) > 1 for c in counts)


def both_skipped(one: StepRecord, other: StepRecord) -> bool:
    """Whether a loss scaler kept both runs from taking the step."""
    return one.effect == other.effect == "skipped_by_scaler"


def exact(*records: RunRecord) -> bool:
    """Whether the runs can be held to the same bits: on a CPU, by one thread."""
    return all(r.device.device_type == "cpu" and r.device.threads == 1 for r in records)


def moved(record: RunRecord) -> dict[str, float]:
    """How far the tensors of each kind (`lora_A`, `lora_B`, `other tensors`) moved from their start, in L2 norm."""
    squares: dict[str, float] = {}
    for t in record.adapter:
        kind = next((p for p in t.name.split(".") if p in ("lora_A", "lora_B")), "other tensors")
        delta = float("nan") if t.delta_norm is None else t.delta_norm
        squares[kind] = squares.get(kind, 0.0) + delta * delta
    return {kind: total**0.5 for kind, total in squares.items()}
