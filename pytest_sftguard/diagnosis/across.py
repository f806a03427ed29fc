"""Causes that only another run of the same training shows: batch splits, repeats, interruptions, replicas."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pytest_sftguard.diagnosis.case import Case, Clue, against, decisive, hint, shown_by, sign
from pytest_sftguard.diagnosis.mechanism import Mechanism
from pytest_sftguard.invariants import batch_split_equivalence as split
from pytest_sftguard.invariants import (
    checkpoint_round_trip,
    loss_counts_once,
    replica_equivalence,
    rerun_bit_equal,
    resume_equivalence,
)
from pytest_sftguard.records import FirstStepRecord, RunRecord
from pytest_sftguard.verdicts import Finding

_CLOSE = 1e-4
"""How closely two numbers agree, as a share, that are the same sum in another order. Measured: 1e-7 for float32 losses.
The numbers that these mechanisms tell apart are 1e-3 and more from each other, or else the splits agree."""
_LOOSE = 0.05
"""How closely two losses stand in the ratio of their numbers of micro-batches: uneven rows move it by up to 0.02."""
_OF_THE_RUN_ALONE = (
    "supervision_audit",
    "rows_arrive",
    "prompt_is_prefix",
    "raw_loss_finite",
    "gradients_finite",
    "loss_is_the_models",
    "loss_counts_once",
    "update_repeats",
    "weights_and_moments_finite",
)
"""Invariants of rows, losses, gradients and updates in one run. Where one of them fails, something changes these from
step to step, and it need not do so in the same steps of a resumed run."""


@dataclass(frozen=True)
class _Split:
    """The first step of one run: what it summed, and over what."""

    loss: float
    """The step's loss, the sum over its micro-batches."""
    micro_losses: tuple[float, ...]
    """Loss of each micro-batch, as `compute_loss` returned it."""
    tokens: FirstStepRecord
    """What the logits say of the same micro-batches."""

    @classmethod
    def of(cls, record: RunRecord | None) -> _Split | None:
        """The first step of `record`; None where its losses were not seen, or are not finite."""
        if record is None or not record.steps or record.first_step is None:
            return None
        loss, micro = record.steps[0].loss, record.steps[0].micro_losses
        if loss is None or not micro or not all(map(math.isfinite, (loss, *micro))):
            return None
        return cls(loss, micro, record.first_step)

    @property
    def count(self) -> int:
        """Number of micro-batches."""
        return len(self.micro_losses)

    @property
    def mean(self) -> float | None:
        """The mean over all labels of the step; None where it is not known."""
        return self.tokens.token_loss

    @property
    def mean_of_means(self) -> float | None:
        """The mean of the micro-batches' means; None where they are not known."""
        means = self.tokens.micro_token_losses
        return math.fsum(means) / len(means) if len(means) == self.count else None

    @property
    def is_piecemeal(self) -> bool:
        """Whether the loss is the mean of the micro-batches' means, and that is not the mean over the labels."""
        means, mean = self.mean_of_means, self.mean
        return means is not None and mean is not None and _same(self.loss, means) and not _same(means, mean)


def _same(one: float, other: float, tolerance: float = _CLOSE) -> bool:
    """Whether two numbers agree within `tolerance` of the larger."""
    return abs(one - other) <= tolerance * max(abs(one), abs(other))


def _splits(case: Case) -> tuple[_Split, _Split] | None:
    """The first steps of the run and of another split of its rows, where these did not come out the same."""
    ours, theirs = _Split.of(case.record), _Split.of(case.references.get("batch_split"))
    found = case.failed(split.Reason.DIFFERS, split.Reason.NOT_ACCUMULATED, split.Reason.REFERENCE_WRONG)
    found += case.failed(split.Reason.NO_MEAN, split.Reason.ADDED_UP)
    found = [f for f in found if f.step in (None, 1)]
    return (ours, theirs) if found and ours is not None and theirs is not None else None


def _forward_agrees(ours: _Split, theirs: _Split) -> bool:
    """Whether the logits of the same rows gave the same mean in both splits, or were not seen."""
    return ours.mean is None or theirs.mean is None or _same(ours.mean, theirs.mean)


def _mean_of_means(case: Case) -> list[Clue]:
    pair = _splits(case)
    if pair is None or not _forward_agrees(*pair):
        return []
    piecemeal = next((s for s in pair if s.count > 1 and s.is_piecemeal), None)
    if piecemeal is None:
        return []
    tokens = ", ".join(map(str, piecemeal.tokens.micro_tokens))
    return [
        decisive(
            f"the loss of step 1, {piecemeal.loss:.6g}, is the mean of the {piecemeal.count} micro-batches' means; the"
            f" mean over all labels is {piecemeal.mean:.6g}"
        ),
        hint(f"the micro-batches have {tokens} labels"),
    ]


def _ratio(case: Case, power: int) -> list[Clue]:
    """Evidence that the losses of two splits stand in the ratio of their numbers of micro-batches, to `power`."""
    pair = _splits(case)
    if pair is None or not _forward_agrees(*pair):
        return []
    ours, theirs = pair
    gradients = [r.steps[0].grad_norm for r in (case.record, case.references["batch_split"])]
    # where no gradient is left, the loss is a constant, and what it adds up to says nothing of a mean
    if ours.count == theirs.count or not all(gradients):
        return []
    wanted = (ours.count / theirs.count) ** power
    # a constant taken off the loss leaves the gradients in their ratio
    ratios = {"loss": (ours.loss, theirs.loss), "gradient's norm": (gradients[0], gradients[1])}
    found = [
        f"the {name} of step 1 is {one:.4g} with {ours.count} micro-batches and {other:.4g} with {theirs.count}"
        for name, (one, other) in ratios.items()
        if one and other and _same(one / other, wanted, _LOOSE)
    ]
    return [decisive(found[0]), *map(hint, found[1:])] if found else []


def _summed(case: Case) -> list[Clue]:
    """Evidence of this run alone that the means of its micro-batches are added up: no other run need have its rows."""
    pair = _splits(case)
    if pair is None or pair[0].count < 2:
        return []
    ours, means = pair[0], pair[0].tokens.micro_token_losses
    if len(means) != ours.count or not all(map(_same, ours.micro_losses, means)) or not _same(ours.loss, sum(means)):
        return []
    return [
        decisive(
            f"the loss of step 1, {ours.loss:.6g}, is the sum of the {ours.count} micro-batches' means over their own"
            f" labels; the mean over all labels is {ours.mean:.6g}"
        )
    ]


def _multiplied(case: Case) -> list[Clue]:
    if _undivided_by_library(case):
        return []
    alone = [*map(decisive, case.failed(loss_counts_once.Reason.ADDED_UP))] or _summed(case)
    return [*alone, *_ratio(case, 1)]


def _undivided_by_library(case: Case) -> list[Clue]:
    clues, first = _ratio(case, 1) or _summed(case), case.record.first_step
    if not clues or first is None or not first.model_loss:
        return []
    # a causal model of transformers divides by num_items_in_batch
    if first.token_loss is not None and not first.loss_undivided:
        return []
    library = f"transformers {case.record.versions.get('transformers', '')}".strip()
    return [
        *clues,
        sign(
            f"{first.model_loss} of {library} computes this loss; the Trainer passes it num_items_in_batch and leaves"
            " the division to it, and its loss does not divide (transformers#47688)"
        ),
    ]


def _divided_twice(case: Case) -> list[Clue]:
    return [*map(decisive, case.failed(loss_counts_once.Reason.DIVIDED_TWICE)), *_ratio(case, -1)]


def _cleared(case: Case) -> list[Clue]:
    runs = [case.record, *(r for n, r in case.references.items() if n == "batch_split")]
    found = [(r.cell, s.step) for r in runs for s in r.steps if s.gradients_cleared]
    if not found or not case.failed("batch_split_equivalence"):
        return []
    cell, step = found[0]
    return [decisive(f"in step {step} of {cell} the gradients of the earlier micro-batches were gone in a later one")]


def _accumulation(case: Case) -> list[Clue]:
    pair = _splits(case)
    if pair is None or pair[0].mean is None or pair[1].mean is None or not _forward_agrees(*pair):
        return []
    found = [f for f in case.failed(split.Reason.DIFFERS) if f.step == 1 and f.evidence.get("name") == "grad_norm"]
    if not found or not _same(pair[0].loss, pair[1].loss):
        return []
    return [decisive(found[0]), hint("the losses of the same rows agree, and so do their logits")]


def _unshifted(case: Case) -> list[Clue]:
    found = case.failed(split.Reason.UNSHIFTED_LABELS)
    if not found:
        return []
    clues, first = [decisive(found[0]), hint("every split of the batch has it alike")], case.record.first_step
    if first is not None and first.model_loss:
        library = case.record.versions.get("transformers", "of an unknown version")
        clues.append(hint(f"{first.model_loss} and the Trainer of transformers {library} count them so"))
    return clues


def _replicas_mean(case: Case) -> list[Clue]:
    found = [f for f in case.failed(replica_equivalence.Reason.DIFFERS) if f.evidence.get("name") == "loss"]
    one, two = _Split.of(case.record), _Split.of(case.references.get("replicas"))
    if not found or one is None or two is None:
        return []
    doubled = next((n for n in (2.0, 0.5) if _same(two.loss, n * one.loss)), None)
    if doubled is not None:
        return [decisive(found[0]), hint(f"the loss is {doubled:g} times as large in two processes")]
    if one.mean is None or two.mean is None or not _same(one.loss, one.mean) or not _same(one.mean, two.mean):
        return []
    # the micro-batches of one process come after those of the other
    pairs = list(zip(two.tokens.micro_tokens, two.tokens.micro_token_losses, strict=True))
    parts = pairs[: two.count], pairs[two.count :]
    labels = [sum(n for n, _ in part) for part in parts]
    if not all(labels):
        return []
    means = [math.fsum(n * loss for n, loss in part) / count for part, count in zip(parts, labels, strict=True)]
    average = math.fsum(means) / 2
    if _same(average, two.mean) or not _same(two.loss, average):
        return []
    counts = " and ".join(map(str, labels))
    return [decisive(found[0]), hint(f"it is the mean of the means of two processes, which have {counts} labels")]


def _resumed_otherwise(case: Case) -> list[Finding]:
    """What differs in the resumed run, and is sound in the other: NaN is no other number than NaN."""
    found = [] if case.failed(*_OF_THE_RUN_ALONE) else case.failed(resume_equivalence.Reason.DIFFERS)
    return [f for f in found if isinstance(f.limit, (int, float)) and math.isfinite(f.limit)]


def _resume_optimizer(case: Case) -> list[Clue]:
    found = _resumed_otherwise(case)
    # loss and gradient are compared before it, and were the same
    same = [f for f in found if f.evidence.get("name") == "max_update"]
    lost = case.failed(checkpoint_round_trip.Reason.NOT_LOADED)
    return [decisive(f) for f in [*lost, *case.failed(resume_equivalence.Reason.SCHEDULE), *same][:1]]


def _checkpoint_changes(case: Case) -> list[Clue]:
    reason = checkpoint_round_trip.Reason
    return [decisive(f) for f in case.failed(reason.CHANGED, reason.ADDED)[:1]]


def _resume_other_rows(case: Case) -> list[Clue]:
    found = case.failed(resume_equivalence.Reason.ROWS)
    return [] if case.failed(*_OF_THE_RUN_ALONE) else [decisive(f) for f in found]


def _resume_elsewhere(case: Case) -> list[Clue]:
    lost = case.failed(resume_equivalence.Reason.NOT_RESTORED)
    found = _resumed_otherwise(case)
    return [decisive(f) for f in [*lost, *(f for f in found if f.evidence.get("name") in ("loss", "grad_norm"))][:1]]


def _broke_off(case: Case) -> bool:
    """Whether the training raised: a Trainer counts a step after the optimizer has taken it."""
    return case.record.error is not None and case.record.error.stage == "train"


def _retried(case: Case) -> list[Clue]:
    record = case.record
    if _broke_off(case) or record.global_step is None or not len(record.steps) > record.global_step:
        return []
    clues = [sign(f"the Trainer counted {record.global_step} optimizer steps, and took {len(record.steps)}")]
    # a loop that steps twice for a batch has steps without one
    if all(s.micro_losses for s in record.steps):
        clues.append(sign("each of them had micro-batches of its own, so that the training began again"))
    return clues


def _stepped_more(case: Case) -> list[Clue]:
    record, bare = case.record, [s.step for s in case.record.steps if not s.micro_losses]
    if _broke_off(case) or record.global_step is None or not bare or not len(record.steps) > record.global_step:
        return []
    return [
        decisive(f"the optimizer took {len(record.steps)} steps, and had no micro-batch in {len(bare)} of them"),
        sign(f"the Trainer counted {record.global_step} (the first of the others: step {bare[0]})"),
    ]


def _not_repeated(case: Case) -> list[Clue]:
    reason = rerun_bit_equal.Reason
    return [decisive(f) for f in case.failed(reason.BITS, reason.DIFFERS)[:1]]


def _logits_differ(case: Case) -> list[Clue]:
    """The forward passes of the same rows, seen in another split."""
    pair = _splits(case)
    # these two say that the rows were not the same, or not known
    if pair is None or _forward_agrees(*pair) or case.failed(split.Reason.NO_MEAN, split.Reason.ADDED_UP):
        return []
    ours, theirs = pair
    clues = [
        decisive(
            f"the mean over the labels of step 1, from the logits, is {ours.mean:.6g} in this batch split and"
            f" {theirs.mean:.6g} in another one of the same rows"
        )
    ]
    return clues if case.repeats else [*clues, against("forward passes do not repeat")]


ACROSS: tuple[Mechanism, ...] = (
    Mechanism(
        "retry_keeps_trained_weights",
        "after running out of memory the training is begun again, counters and all, with the weights that it had",
        "set auto_find_batch_size=False and a batch that fits (`python -m pytest_sftguard fit` says which)",
        _retried,
    ),
    Mechanism(
        "accumulation_mean_of_means",
        "the micro-batches' means are averaged, so that short ones weigh as much as long ones",
        "divide the sum over tokens by num_items_in_batch, the labels that count in the whole step",
        _mean_of_means,
    ),
    Mechanism(
        "library_leaves_loss_undivided",
        "transformers divides this model's loss by nothing, so that it grows with the number of micro-batches",
        "set model_accepts_loss_kwargs=False on the Trainer, which then divides; or waive batch_split_equivalence and"
        " lower the learning rate accordingly",
        _undivided_by_library,
    ),
    Mechanism(
        "loss_grows_with_micro_batches",
        "loss and gradients grow with the number of micro-batches: nothing divides by it, or something multiplies",
        "divide by num_items_in_batch in compute_loss, or set loss_is_scaled_for_ga=False, so that the Trainer divides",
        _multiplied,
    ),
    Mechanism(
        "loss_divided_twice",
        "the loss is divided by the number of micro-batches once too often, and shrinks as they become more",
        "let either compute_loss or the Trainer divide: a loss over num_items_in_batch is not divided again",
        _divided_twice,
    ),
    Mechanism(
        "gradients_cleared_between_micro_batches",
        "the gradients are cleared in the middle of an accumulated step, which then learns from its last part alone",
        "call zero_grad after the optimizer's step, and not in each training_step",
        _cleared,
    ),
    Mechanism(
        "loss_divided_by_unshifted_labels",
        "the loss is divided by more labels than are predicted: those at the first position of a row count, too",
        "count labels[..., 1:], or mask the first position of every row with -100; where the library counts so, waive"
        " batch_split_equivalence",
        _unshifted,
    ),
    Mechanism(
        "replicas_average_means",
        "what the processes compute together is not what one computes of the same rows",
        "average over the tokens of all processes (average_tokens_across_devices=True), and scale by no rank count",
        _replicas_mean,
    ),
    Mechanism(
        "replicas_train_apart",
        "the processes do not exchange their gradients, or not all of them, and end with adapters of their own",
        "train the model that accelerate prepared, and look for parameters that DDP does not see, or ignores",
        shown_by(replica_equivalence.Reason.APART),
    ),
    Mechanism(
        "resume_loses_scale",
        "the resumed run starts with another loss scale than the interrupted one had",
        "save and load scaler.pt with the checkpoint",
        shown_by(resume_equivalence.Reason.SCALE),
    ),
    Mechanism(
        "checkpoint_changes_state",
        "the state of the optimizer that is loaded from a checkpoint is not the one that was saved",
        "look at what overrides or wraps _save_optimizer_and_scheduler, _load_optimizer_and_scheduler and the"
        " optimizer's load_state_dict",
        _checkpoint_changes,
    ),
    Mechanism(
        "resume_loses_state",
        "the resumed run does not go on where it was interrupted: optimizer or schedule began anew",
        "save and load optimizer.pt and scheduler.pt with the checkpoint; transformers skips both if one is missing",
        _resume_optimizer,
    ),
    Mechanism(
        "resume_sees_other_rows",
        "the resumed run goes on with other rows than the interrupted one would have seen",
        "leave ignore_data_skip=False, and seed the order of the rows from the step, not from the process",
        _resume_other_rows,
    ),
    Mechanism(
        "rows_come_in_another_order",
        "the same training with the same seed sees other rows",
        "seed the sampler, the workers and whatever the data set draws at random",
        shown_by(rerun_bit_equal.Reason.ROWS),
    ),
    Mechanism(
        "accumulated_gradient_wrong",
        "the micro-batches' losses are right, and the gradient that they add up to is not that of the whole batch",
        "look between the loss and the last backward of a step: detach, hooks on gradients, zero_grad, no_sync",
        _accumulation,
        locates=True,
    ),
    Mechanism(
        "forward_depends_on_the_batch_split",
        "the model says other things of the same rows where they are batched otherwise",
        "look at the collator's padding, attention_mask and position_ids, and for layers that mix the rows of a batch",
        _logits_differ,
        locates=True,
    ),
    Mechanism(
        "optimizer_stepped_beside_the_loop",
        "the optimizer takes more steps than the training loop asks for",
        "look for optimizer.step() in compute_loss, training_step and callbacks",
        _stepped_more,
        locates=True,
    ),
    Mechanism(
        "resume_restores_something_else",
        "the resumed run does not begin with all that the interrupted one ended with: weights, random state, or what"
        " else a model keeps, as AdaLoRA does of its ranks",
        "look for it in the checkpoint's files, by other names as well; where a library writes and reads them, as peft"
        " does for p-tuning and AdaLoRA, train in one go and waive resume_equivalence",
        _resume_elsewhere,
        locates=True,
    ),
    Mechanism(
        "not_repeatable",
        "the same training gives other numbers the second time",
        "look for generators without a seed, state kept between runs, and kernels that are not deterministic",
        _not_repeated,
        locates=True,
    ),
)
"""Causes that other runs show; of two that are worth the same, the earlier goes first."""
