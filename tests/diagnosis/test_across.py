"""Causes that another run or look shows: each has evidence of its own, and no invariant stands for a cause."""

from __future__ import annotations

import dataclasses
import math

import pytest

from pytest_sftguard.diagnosis import diagnose
from pytest_sftguard.invariants import load_invariants
from pytest_sftguard.records import ComparisonRecord, DecodingRecord, DifferenceRecord, ErrorRecord, PathRecord
from pytest_sftguard.verdicts import JudgedRun, judge
from tests.support.canned import healthy, with_step, with_steps, within
from tests.support.cases.across import first, run

ALL = load_invariants()
NAN = math.nan


def named(record, **references):
    """The mechanisms that are named for `record`, the best first."""
    return [d.mechanism for d in diagnose(JudgedRun(record, judge(record, ALL, references), references))]


def summed(factor, batch=(2, 4), **changes):
    """A run in `batch` whose first loss and gradient are `factor` times those of the mean over all labels."""
    return first(norm_of(with_step(plain(batch), 1, loss=4.0 * factor), 2.0 * factor), **changes)


def plain(batch):
    """A run in `batch` that clips and logs nothing, so that its first step may be given any numbers."""
    record = with_steps(dataclasses.replace(run(batch), max_grad_norm=0.0, log=()), received_grad_norm=1.0)
    return norm_of(record, 2.0)


def norm_of(record, norm):
    """`record` with another norm of the first gradient."""
    return with_step(record, 1, grad_norm=norm, received_grad_norm=norm)


def added_up(**changes):
    """A run whose first loss is the sum of the means of its micro-batches."""
    record = first(plain((2, 4)), **changes)
    means = record.first_step.micro_token_losses
    return norm_of(with_step(record, 1, loss=math.fsum(means), micro_losses=means), 8.0)


UNKNOWN_TOKENS = {"token_loss": None, "micro_tokens": (), "micro_token_losses": (), "labels": None}
SPLITS = {
    "mean-of-means": (with_step(plain((2, 4)), 1, loss=3.975), plain((4, 2)), "accumulation_mean_of_means"),
    "added-up": (summed(4.0), summed(2.0, (4, 2)), "loss_grows_with_micro_batches"),
    "added-up-by-the-library": (
        summed(4.0, model_loss="LlamaForSequenceClassification", **UNKNOWN_TOKENS),
        summed(2.0, (4, 2), model_loss="LlamaForSequenceClassification", **UNKNOWN_TOKENS),
        "library_leaves_loss_undivided",
    ),
    "added-up-by-a-class-of-the-library": (
        added_up(model_loss="T5ForConditionalGeneration", loss_undivided=True),
        plain((4, 2)),
        "library_leaves_loss_undivided",
    ),
    "added-up-of-other-rows": (
        with_steps(added_up(), rows="decade"),
        first(plain((4, 2)), token_loss=5.0),
        "loss_grows_with_micro_batches",
    ),
    "divided-twice": (
        summed(0.25, **UNKNOWN_TOKENS),
        summed(0.5, (4, 2), **UNKNOWN_TOKENS),
        "loss_divided_twice",
    ),
    "cleared": (with_step(norm_of(plain((2, 4)), 0.5), 1, gradients_cleared=True), plain((4, 2)), "gradients_cleared_"),
    "gradient-alone": (norm_of(plain((2, 4)), 0.5), plain((4, 2)), "accumulated_gradient_wrong"),
    "forward": (
        first(with_step(plain((2, 4)), 1, loss=4.2), token_loss=4.2),
        plain((4, 2)),
        "forward_depends_on_the_batch_split",
    ),
}


@pytest.mark.parametrize(("record", "other", "mechanism"), SPLITS.values(), ids=SPLITS)
def test_a_batch_split_that_matters_has_its_cause(record, other, mechanism):
    """What stands in which ratio tells why two splits of the same rows differ."""
    assert named(record, batch_split=other)[0].startswith(mechanism)


def test_a_split_that_differs_by_any_number_has_no_cause():
    """A loss of its own that is 10 % off for no reason that the numbers give."""
    one, other = summed(1.1, **UNKNOWN_TOKENS), summed(1.0, (4, 2), **UNKNOWN_TOKENS)
    assert named(one, batch_split=other) == []


def decoding(**changes):
    """A record whose answers in a batch are not those alone."""
    difference = DifferenceRecord(prompt="1 + 1 =", position=0, margin=0.5, alone="2", batched="7")
    seen = {"arithmetic": "float32", "prompts": 8, "padded": 4, "max_change": 0.5, "repeated": True}
    return healthy(answers=[2.0], decoding=DecodingRecord(**(seen | {"differences": (difference,)} | changes)))


@pytest.mark.parametrize(
    ("changes", "mechanism"),
    [
        ({"right_padded": 4, "unmasked": 0}, "padded_on_the_right"),
        ({"right_padded": 0, "unmasked": 12}, "prompts_padded_without_mask"),
        ({"right_padded": 0, "unmasked": 0}, "answers_depend_on_their_batch"),
        ({"right_padded": 4, "repeated": False}, "evaluation_is_random"),
    ],
    ids=["right", "unmasked", "neither", "random"],
)
def test_answers_of_a_batch_have_their_cause(changes, mechanism):
    """Padding is a cause where it was seen, and where forward passes repeat."""
    assert named(decoding(**changes))[0] == mechanism


def context(*far, packed=0, **changes):
    """A record whose rows are not their own in the settings `far`."""
    settings = ("as trained on", "padded left", "padded right", "alone")
    comparisons = tuple(
        ComparisonRecord(setting=s, attention="sdpa", rows=4, packed=packed, max_change=1.0 if s in far else 1e-7)
        for s in settings
    )
    return within(healthy(), "context", comparisons=comparisons, asked=len(comparisons), **changes)


BATCH, MASKED = ("input_ids",), ("attention_mask", "input_ids")
CONTEXTS = {
    "padding": (context("as trained on", inputs=BATCH, padding_seen=9), "padding_attended"),
    "positions": (context("as trained on", inputs=MASKED, rotary=0), "positions_count_padding"),
    "mask": (context("as trained on", inputs=MASKED), "batch_built_otherwise"),
    "packs": (context("as trained on", packed=4, inputs=MASKED), "packed_rows_see_each_other"),
    "state": (
        context("as trained on", packed=4, inputs=("input_ids", "position_ids"), recurrent="linear_attention"),
        "state_runs_on_across_packs",
    ),
    "stray-bos": (context("as trained on", packed=2, inputs=MASKED), "batch_built_otherwise"),
    "model": (context("as trained on", "padded left", "padded right", inputs=MASKED), "rows_depend_on_their_batch"),
    "kernel": (context("alone", inputs=MASKED), "attention_kernels_disagree"),
}


@pytest.mark.parametrize(("record", "mechanism"), CONTEXTS.values(), ids=CONTEXTS)
def test_rows_in_context_have_their_cause(record, mechanism):
    """Whether the training's batch or the model is at fault shows in which settings rows differ."""
    assert named(record)[0] == mechanism


def kernel(loss):
    """A record whose first micro-batch has `loss` and gradients that are NaN, and sound ones with plain kernels."""
    record = with_step(healthy(log=False), 1, micro_losses=(loss,), loss=loss, grad_norm=NAN, received_grad_norm=NAN)
    paths = (PathRecord(name="plain kernels", loss=4.0, max_change=0.0),)
    names = dataclasses.replace(record.steps[0].zero_gradients)
    return within(record, "paths", loss=loss, nonfinite=names, switched=("sdpa",), attention="sdpa", paths=paths)


@pytest.mark.parametrize(("loss", "direction"), [(NAN, "forward"), (4.0, "backward")])
def test_a_kernel_fails_forwards_or_backwards(loss, direction):
    """A loss that is finite tells that the forward pass was right."""
    assert named(kernel(loss))[0] == f"attention_kernel_{direction}_not_finite"


def test_an_overflow_goes_before_what_it_does_to_the_schedule():
    """In float16, without a finite loss at any step, the rate is not the cause."""
    from pytest_sftguard.matrix import Cell

    lost = healthy(Cell("fp16-mixed", 2, 1), steps=8, skipped=range(1, 9))
    steps = tuple(dataclasses.replace(s, loss=NAN, micro_losses=(NAN,), learning_rate=9.0 - s.step) for s in lost.steps)
    record = within(dataclasses.replace(lost, steps=steps), "schedule", rates=tuple(float(n) for n in range(8, 0, -1)))
    assert named(within(record, "optimizer", fused=True), fp32=healthy(steps=8))[0] == "forward_overflow_in_float16"


@pytest.mark.parametrize(("loss", "averaged"), [(4.0, True), (4.6, False)])
def test_processes_that_average_means_give_the_mean_of_their_means(loss, averaged):
    """Any other loss of the same logits has another cause."""
    seen = {"micro_tokens": (3, 9), "micro_token_losses": (2.0, 6.0), "token_loss": 5.0}
    one = with_step(first(plain((8, 1)), **seen), 1, loss=5.0, micro_losses=(5.0,))
    two = with_step(first(plain((8, 1)), **seen), 1, loss=loss, micro_losses=(loss,))
    found = named(one, replicas=dataclasses.replace(two, replica_digests=("5eed", "5eed")))
    assert ("replicas_average_means" in found) == averaged


@pytest.mark.parametrize(
    ("ours", "resumption"),
    [({"max_update": 1e-3}, True), ({"max_update": NAN}, False), ({"max_update": 1e-3, "departure": 0.5}, False)],
    ids=["sound", "nan", "update-altered"],
)
def test_a_resumption_is_no_cause_of_what_was_wrong_before(ours, resumption):
    """A run with NaN, or whose updates are altered, differs from itself resumed."""
    record = with_step(healthy(), 2, **ours)
    found = named(record, resumed=with_step(healthy(), 2, max_update=NAN))
    assert ("resume_loses_state" in found) == resumption


def test_a_step_that_raised_is_no_retry():
    """A Trainer counts a step only after the optimizer took it, so that an exception leaves one more."""
    broken = healthy(error=ErrorRecord(stage="train", type="RuntimeError", message="no"), global_step=3)
    assert named(broken) == []
    assert named(dataclasses.replace(broken, error=None, max_steps=4))[0] == "retry_keeps_trained_weights"
