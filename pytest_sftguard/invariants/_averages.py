"""What the loss of a step is of the cross-entropy of its labels."""

from __future__ import annotations

import math

from pytest_sftguard.invariants._comparing import gap
from pytest_sftguard.records import EntropyRecord, RunRecord

RTOL = 1e-4
"""Largest relative difference between a loss and the mean that it is: a hundred times the rounding of float32."""


def of_first_step(record: RunRecord) -> EntropyRecord | None:
    """The cross-entropy of the first step's micro-batches; None where it was not seen, or is not finite."""
    first, steps = record.first_step, record.steps
    if first is None or not first.token_loss or not steps or not all(map(math.isfinite, first.micro_token_losses)):
        return None
    counts = {len(first.micro_token_losses), len(first.micro_tokens), len(steps[0].micro_losses)}
    if len(counts) > 1 or not sum(first.micro_tokens):
        return None
    return EntropyRecord(step=1, micro=first.micro_token_losses, tokens=first.micro_tokens)


def means(step: EntropyRecord) -> tuple[float, float]:
    """The mean over all labels of a step, and the mean of its micro-batches' means."""
    total = math.fsum(n * mean for n, mean in zip(step.tokens, step.micro, strict=True))
    return total / sum(step.tokens), math.fsum(step.micro) / len(step.micro)


def known(record: RunRecord) -> tuple[float, ...]:
    """What the loss of the first step may rightly be; empty where its labels were not seen.

    The mean over its labels, also with those at the first position in the divisor, which is for batch_split_equivalence
    to report, and the mean of its micro-batches' means.
    """
    own, first = of_first_step(record), record.first_step
    if own is None or first is None:
        return ()
    over_labels, of_means = means(own)
    return over_labels, of_means, over_labels * sum(own.tokens) / (first.labels or sum(own.tokens))


def is_mean(record: RunRecord, rtol: float = RTOL) -> bool | None:
    """Whether the loss of the first step is a mean of the cross-entropy of its labels; None where that is not known."""
    loss, right = record.steps[0].loss if record.steps else None, known(record)
    return None if loss is None or not right else any(gap(loss, value) <= rtol for value in right)
