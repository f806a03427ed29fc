"""Two runs side by side: no gap in either ever passes, and runs that differ in nothing that counts do."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_sftguard.invariants import load_invariants
from pytest_sftguard.invariants._comparing import gap, resolution
from pytest_sftguard.matrix import Cell
from pytest_sftguard.records import RunRecord
from pytest_sftguard.rendering import message
from pytest_sftguard.verdicts import Outcome, judge
from tests.strategies import non_finite
from tests.support.canned import H100, A, healthy, with_step, with_tensor, within
from tests.support.cases.across import (
    AUXILIARY,
    ERROR,
    FALLING,
    NOISY,
    SCALED,
    UNSETTLED,
    drawing,
    first,
    half,
    moving,
    one_batch,
    replicas,
    run,
    stepped,
    threaded,
)

INVARIANTS = {getattr(i, "reference", None): i for i in load_invariants() if getattr(i, "reference", None)}
PAIRS = {
    "batch_split": (run(), run((4, 2))),
    "fp32": (half(), run()),
    "rerun": (run(), run(variant="rerun")),
    "resumed": (run(), run(variant="resumed")),
    "one_batch": (run(), one_batch(*FALLING)),
    "replicas": (run(), replicas()),
}
READ = {
    "batch_split": ("loss", "grad_norm"),
    "fp32": ("loss", "grad_norm"),
    "rerun": ("loss", "grad_norm", "learning_rate"),
    "resumed": ("loss", "grad_norm", "learning_rate", "max_update"),
    "one_batch": ("loss",),
    "replicas": ("loss", "grad_norm"),
}
"""Numbers of a step that each comparison reads."""


def outcome(name: str, record: RunRecord, reference: RunRecord) -> Outcome:
    """What the invariant that compares with the reference `name` says of the two."""
    return judge(record, [INVARIANTS[name]], {name: reference}).outcome


def test_every_reference_has_its_invariant() -> None:
    """Each reference is compared with by one invariant."""
    assert set(INVARIANTS) == set(PAIRS)


@pytest.mark.parametrize("name", PAIRS)
def test_runs_that_agree_pass(name: str) -> None:
    """Two runs that agree in all that the reference is for pass."""
    assert outcome(name, *PAIRS[name]) is Outcome.PASSED


@pytest.mark.parametrize(("precision", "wording"), [("fp32", Outcome.FAILED), ("bf16-mixed", Outcome.PASSED)])
def test_two_splits_in_bfloat16_are_as_far_apart_as_from_float32(precision: str, wording: Outcome) -> None:
    """0.3 % of the loss, as a model of 30 layers rounds it, where each is the mean over its own labels."""
    record = first(stepped(run((4, 2), precision), loss=4.012), token_loss=4.012)
    assert outcome("batch_split", record, run(precision=precision)) is wording


@pytest.mark.parametrize(
    ("rates", "factor", "wording"),
    [
        ([8, 7, 6, 5, 4, 3, 2, 1], 0.4, Outcome.PASSED),
        ([8, 7, 6, 5, 4, 3, 2, 1], 0.25, Outcome.FAILED),
        ([1] * 8, 0.4, Outcome.FAILED),
        ([1] * 8, 0.45, Outcome.PASSED),
        ([1, 2, 3, 4, 5, 6, 7, 8], 0.45, Outcome.PASSED),
        ([math.inf] * 8, 0.4, Outcome.FAILED),
        ([math.nan] * 8, 0.4, Outcome.FAILED),
        ([None] * 8, 0.4, Outcome.FAILED),
    ],
)
def test_skipped_steps_take_their_learning_rates_with_them(
    rates: list[float | None], factor: float, wording: Outcome
) -> None:
    """A schedule that runs on at three skipped steps of eight leaves less than five eighths of the way."""
    record, reference = healthy(SCALED, steps=8, skipped={1, 2, 3}), healthy(Cell("fp32", 8, 1), steps=8)
    for step, rate in enumerate(rates, 1):
        record, reference = (with_step(r, step, learning_rate=rate) for r in (record, reference))
    for step in range(1, 9):
        record, reference = (with_step(r, step, loss=4.0 - step, grad_norm=2.0) for r in (record, reference))
    record = stepped(record, loss=3.0001)
    assert outcome("fp32", moving(record, factor), reference) is wording


@given(data=st.data(), value=st.none() | non_finite())
def test_a_hole_in_either_never_passes(data: st.DataObject, value: float | None) -> None:
    """NaN, infinity or nothing at all in the place of a number of the first step of either run never passes."""
    name = data.draw(st.sampled_from(sorted(PAIRS)))
    number = data.draw(st.sampled_from(READ[name]))
    record, reference = PAIRS[name]
    if name == "one_batch" or data.draw(st.booleans()):
        reference = stepped(reference, **{number: value})
    else:
        record = stepped(record, **{number: value})
    assert outcome(name, record, reference) is not Outcome.PASSED


def with_gradients(record: RunRecord, *norms: float | None, whole: float = 2.0) -> RunRecord:
    """`record` with tensors whose first gradients have `norms`, and all together `whole`."""
    first = record.adapter[0]
    named = enumerate(norms)
    tensors = (dataclasses.replace(first, name=f"{i}.lora_B", first_gradient_norm=n) for i, n in named)
    return stepped(dataclasses.replace(record, adapter=tuple(tensors)), grad_norm=whole)


@pytest.mark.parametrize(
    ("name", "norms", "whole", "wording"),
    [
        # one tensor, which carries the norm
        ("fp32", (1.01, 1.01, 0.3), 1.2, Outcome.PASSED),
        # two of three
        ("fp32", (1.2, 1.2, 1.0), 2.0, Outcome.FAILED),
        # one that carries too much
        ("fp32", (1.01, 1.01, 0.01), 0.1, Outcome.FAILED),
        ("fp32", (math.nan, 1.01, 1.0), 2.0, Outcome.FAILED),
        ("fp32", (1.01, math.inf, 1.0), 2.0, Outcome.FAILED),
        ("fp32", (1.01, 1.01, 1.0), math.nan, Outcome.FAILED),
        # as if nothing but the norm of all were known
        ("fp32", (None, None, None), 2.2, Outcome.FAILED),
        ("fp32", (None, None, None), 2.001, Outcome.PASSED),
        # two that lack their gradients
        ("fp32", (1.0, None, None), 1.2, Outcome.FAILED),
        # another invariant's business
        ("fp32", (1.0, 1.0, None), 1.42, Outcome.PASSED),
        # half of four
        ("fp32", (1.01, 1.2, 1.2, 1.01), 2.0, Outcome.FAILED),
        ("fp32", (1.01, 1.01, 1.01, 1.2), 2.0, Outcome.PASSED),
        ("batch_split", (1.0, 1.0, 1e-9, 3e-9), 2.0, Outcome.FAILED),
        ("batch_split", (1.0, 1.0, 1.00005), 2.0001, Outcome.PASSED),
        ("batch_split", (1.001, 1.001, 1.0), 2.0, Outcome.FAILED),
        ("replicas", (1.001, 1.001, 1.0), 2.0, Outcome.FAILED),
    ],
)
def test_gradients_are_compared_tensor_by_tensor(
    name: str, norms: tuple[float | None, ...], whole: float, wording: Outcome
) -> None:
    """More than half of the tensors must agree closely, and the norm of all less so: few of them may carry it."""
    record, reference = PAIRS[name]
    reference = with_gradients(reference, *[1.0] * len(norms))
    assert outcome(name, with_gradients(record, *norms, whole=whole), reference) is wording


def test_gradients_that_cancel_are_noise() -> None:
    """A key's bias gets sums of what softmax makes zero: their rounding differs in every batch split."""
    record, reference = PAIRS["batch_split"]
    noise = with_gradients(record, 1.0, 3e-9, 1e-9), with_gradients(reference, 1.0, 1e-9, 2e-9)
    assert outcome("batch_split", *noise) is Outcome.PASSED


def test_a_lower_learning_rate_is_no_excuse() -> None:
    """Where no step was skipped, an adapter that came less far than float32's is reported, whatever the rates were."""
    slow = half()
    for step in range(1, len(slow.steps) + 1):
        slow = with_step(slow, step, learning_rate=(run().steps[step - 1].learning_rate or 0.0) / 2)
    assert outcome("fp32", moving(slow, 0.4), run()) is Outcome.FAILED


@pytest.mark.parametrize("name", ["rerun", "resumed"])
@given(data=st.data())
def test_any_other_bit_fails(name: str, data: st.DataObject) -> None:
    """Where bits are compared, a loss that is the next number up fails, at any step."""
    record, reference = PAIRS[name]
    step = data.draw(st.integers(1, len(reference.steps)))
    loss = math.nextafter(reference.losses[step - 1], math.inf)
    assert outcome(name, record, with_step(reference, step, loss=loss)) is Outcome.FAILED


@pytest.mark.parametrize(
    ("name", "record", "reference"),
    [
        pytest.param("batch_split", stepped(run(), loss=4.00001), run((4, 2)), id="last-digits"),
        pytest.param(
            "batch_split", drawing(stepped(run(), grad_norm=3.0), "adapter"), run((4, 2)), id="adapter-dropout"
        ),
        pytest.param("rerun", threaded(stepped(run(), loss=4.00001)), threaded(run()), id="threads"),
        pytest.param("resumed", threaded(run()), with_step(threaded(run()), 4, loss=2.02), id="drift"),
        pytest.param("one_batch", run(), one_batch(*[x * 0.9 for x in FALLING], entropy=0.5), id="falls"),
        pytest.param("one_batch", run(), one_batch(4.0, 3.9999, 3.9998, 3.9997), id="falls-little"),
        pytest.param("one_batch", run(), one_batch(4.0, 4.0, *[3.9] * 6), id="warms-up"),
        pytest.param("fp32", moving(half(), 1.2), run(), id="moved-alike"),
        pytest.param("batch_split", stepped(run(tf32=True), loss=4.004), run((4, 2), tf32=False), id="tf32-in-one"),
        pytest.param("replicas", run(device=H100), replicas(), id="other-device"),
    ],
)
def test_what_may_differ(name: str, record: RunRecord, reference: RunRecord) -> None:
    """Differences that rounding, dropout or threads make are none."""
    assert outcome(name, record, reference) is Outcome.PASSED


EVEN = first(run((4, 2)), micro_tokens=(12, 12))
OPEN = {
    "other-rows": ("batch_split", run(), stepped(run((4, 2)), rows="7ea"), "saw other rows"),
    "rows-unknown": ("batch_split", stepped(run(), rows=None), run((4, 2)), "is not known"),
    "dropout": ("batch_split", drawing(run(), "model"), drawing(run((4, 2)), "model"), "draws random numbers"),
    "even-rows": ("batch_split", run(), EVEN, "has the same number of labels"),
    "auxiliary": ("batch_split", *AUXILIARY, "only its author can say"),
    "nothing-accumulated": (
        "batch_split",
        first(stepped(run(), loss=4.1), token_loss=None),
        run((4, 2)),
        "nothing is accumulated in this cell",
    ),
    "float32-lost": ("fp32", half(), with_step(run(), 3, loss=math.nan), "is not finite at every step: it is no"),
    "own-loss": ("replicas", stepped(run(), loss=4.4), stepped(replicas(), loss=4.6), "only its author can say"),
    "other-split-is-wrong": (
        "batch_split",
        run(),
        stepped(run((2, 4)), loss=4.1),
        "in fp32-b2x4 it is not: that one is wrong",
    ),
    "float32-itself": ("fp32", run(), run(), "is the float32 one itself"),
    "bf16-rounds-it-away": (
        "one_batch",
        half(),
        one_batch(*[4.0] * 8, precision="bf16-mixed"),
        "rounds away what the adapter changed",
    ),
    "bf16-noise": ("one_batch", half(), one_batch(4.0, 4.001, 3.999, 4.002, precision="bf16-mixed"), "less than"),
    "dropout-noise": ("one_batch", run(), one_batch(*NOISY, random="model"), "less than dropout"),
    "settled-in-noise": ("one_batch", run(), one_batch(*UNSETTLED, random="model"), "less than dropout"),
    "replicas-dropout": (
        "replicas",
        drawing(run(), "model"),
        replicas(),
        "draws random numbers in training, such as dropout, and those of fp32-b4x1",
    ),
    "replicas-refused": ("replicas", run(), replicas(steps=(), error=ERROR), "cannot be trained in two processes"),
    "other-device": (
        "replicas",
        run(device=H100, precision="bf16-mixed"),
        replicas(precision="bf16-mixed"),
        "run on cpu and the cell on cuda: only float32",
    ),
    "other-base": (
        "replicas",
        run(device=H100),
        within(replicas(), "base", digest_before="0"),
        "where the base has other weights",
    ),
    "other-start": (
        "replicas",
        run(device=H100),
        with_tensor(replicas(), A, initial_norm=9.0),
        "where the adapter begins with other numbers",
    ),
    "unstable": (
        "fp32",
        with_step(with_step(half(), 2, loss=0.5), 3, loss=3.0),
        with_step(run(), 2, loss=0.5),
        "where it rises by as much from one step to the next",
    ),
    "sampled": ("fp32", first(half(), sampled=True), run(), "learns from answers of the model itself"),
    "noise": ("fp32", first(half(), noise="uniform_"), run(), "draws numbers with uniform_ in half precision"),
    "other-tensors": ("replicas", run(device=H100), replicas(adapter=()), "where other tensors are trained"),
}


@pytest.mark.parametrize(("name", "record", "reference", "wording"), OPEN.values(), ids=OPEN)
def test_what_cannot_be_compared(name: str, record: RunRecord, reference: RunRecord, wording: str) -> None:
    """Where two runs say nothing of each other, that is said, and it holds up no cell."""
    (finding, *_) = judge(record, [INVARIANTS[name]], {name: reference}).findings
    assert (finding.outcome, finding.required) == (Outcome.NOT_EVALUATED, False)
    assert wording in message(finding)


@given(one=st.floats(1e-6, 1e6), other=st.floats(1e-6, 1e6))
def test_gap_is_a_share(one: float, other: float) -> None:
    """The difference of two numbers is the same in either order, and a share of the larger."""
    assert 0 <= gap(one, other) == gap(other, one) <= 1


def test_gap_of_nothing() -> None:
    """Two zeros do not differ; what is no number differs by no number."""
    assert gap(0.0, 0.0) == 0.0
    assert math.isnan(gap(math.nan, 1.0))
    assert math.isnan(gap(math.inf, math.inf))


@pytest.mark.parametrize(("loss", "bits"), [(4.125, 8), (4.12890625, 11), (4.1234567, 0)])
def test_losses_tell_their_type(loss: float, bits: int) -> None:
    """A loss of eight significant bits was rounded to bfloat16, and can be held to no more."""
    assert resolution(stepped(run(), micro_losses=(loss,))) == (2.0**-bits if bits else 0.0)
