"""Causes that only another run of the same training shows: batch splits, repeats, interruptions, replicas."""

from __future__ import annotations

from pytest_sftguard.diagnosis.case import Case, Clue, against, decisive, shown_by, sign
from pytest_sftguard.diagnosis.mechanism import Mechanism
from pytest_sftguard.invariants import batch_split_equivalence, resume_equivalence


def _split(case: Case) -> list[Clue]:
    unshifted = batch_split_equivalence.Reason.UNSHIFTED_LABELS
    found = [f for f in case.failed("batch_split_equivalence") if not f.because(unshifted)]
    if not found:
        return []
    clues = [sign(found[0]), sign("the rows of the step are the same, and the weights are")]
    return clues if case.lost is None else [*clues, against("the loss is not finite, whatever the batch split")]


def _unshifted(case: Case) -> list[Clue]:
    found = case.failed(batch_split_equivalence.Reason.UNSHIFTED_LABELS)
    return [decisive(found[0]), decisive("every split of the batch has it alike")] if found else []


def _resumed(case: Case) -> list[Clue]:
    return [] if case.failed(resume_equivalence.Reason.SCALE) else shown_by("resume_equivalence")(case)


def _retried(case: Case) -> list[Clue]:
    record = case.record
    if record.global_step is None or not len(record.steps) > record.global_step:
        return []
    return [
        sign(f"the Trainer counted {record.global_step} optimizer steps, and took {len(record.steps)}"),
        sign("the training began again with the weights of the attempt before"),
    ]


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
        _split,
    ),
    Mechanism(
        "loss_divided_by_unshifted_labels",
        "the loss is divided by more labels than are predicted: those at the first position of a row count, too",
        "count labels[..., 1:], or mask the first position of every row with -100",
        _unshifted,
    ),
    Mechanism(
        "replicas_average_means",
        "what the processes compute together is not what one computes of the same rows",
        "average over the tokens of all processes (average_tokens_across_devices=True), and scale by no rank count",
        shown_by("replica_equivalence"),
    ),
    Mechanism(
        "resume_loses_scale",
        "the resumed run starts with another loss scale than the interrupted one had",
        "save and load scaler.pt with the checkpoint",
        shown_by(resume_equivalence.Reason.SCALE),
    ),
    Mechanism(
        "resume_loses_state",
        "the resumed run does not go on where it was interrupted: optimizer or schedule began anew",
        "save and load optimizer.pt and scheduler.pt with the checkpoint; transformers skips both if one is missing",
        _resumed,
    ),
    Mechanism(
        "not_repeatable",
        "the same training gives other numbers the second time",
        "look for generators without a seed, state kept between runs, and kernels that are not deterministic",
        shown_by("rerun_bit_equal", clue=sign),
    ),
)
"""Causes that other runs show; of two that are worth the same, the earlier goes first."""
