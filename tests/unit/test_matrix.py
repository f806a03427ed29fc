"""The matrix: how its axes expand into cells, and invalid values."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_sftguard.matrix import Batch, Cell, expand, parse_batch
from pytest_sftguard.precision import MODES
from tests.strategies import batches, cells, precisions

OPEN = st.lists(st.builds(Batch, st.integers(1, 8)), min_size=1, max_size=4)
PRECISIONS = st.lists(precisions(), min_size=1, max_size=4)


@given(axis=PRECISIONS, asked=OPEN)
def test_ids_are_unique(axis, asked):
    """No two cells of a matrix have the same id."""
    ids = [str(c) for c in expand(axis, asked)]
    assert len(ids) == len(set(ids))


@given(axis=PRECISIONS, asked=OPEN)
def test_every_precision_meets_every_batch(axis, asked):
    """The matrix is the whole product of its axes."""
    met = {(c.precision, c.per_device_train_batch_size) for c in expand(axis, asked)}
    assert met == {(p, b.per_device) for p in axis for b in asked}


@given(axis=PRECISIONS, asked=OPEN)
def test_open_batches_share_one_effective_batch(axis, asked):
    """Cells without a given accumulation have the same number of rows per step."""
    assert len({c.effective_batch for c in expand(axis, asked)}) == 1


@given(axis=PRECISIONS, asked=OPEN, factor=st.integers(1, 4))
def test_given_effective_batch_is_kept(axis, asked, factor):
    """Every open batch is accumulated up to the requested effective batch."""
    # every batch from 1 to 8 divides 840
    effective = factor * 840
    assert {c.effective_batch for c in expand(axis, asked, effective)} == {effective}


@given(precision=precisions(), per_device=st.integers(1, 64), accumulation=st.integers(1, 64))
def test_written_accumulation_is_kept(precision, per_device, accumulation):
    """A batch with its own accumulation keeps it."""
    (cell,) = expand([precision], [Batch(per_device, accumulation)])
    assert cell == Cell(precision, per_device, accumulation)


@given(cell=cells(), other=cells())
def test_id_tells_cells_apart(cell, other):
    """Two cells have the same id only if they are the same cell."""
    assert (str(cell) == str(other)) == (cell == other)


def test_id_is_stable():
    """Ids are a contract: --lf, CI configurations and baselines contain them."""
    assert [str(c) for c in expand(["fp32", "bf16-mixed"], [Batch(2), Batch(8)])] == [
        "fp32-b2x4",
        "fp32-b8x1",
        "bf16-mixed-b2x4",
        "bf16-mixed-b8x1",
    ]


@given(cell=cells())
def test_id_needs_no_quoting(cell):
    """An id is safe in a shell, in `-k` and in a file name."""
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", str(cell))


def test_batch_that_does_not_divide_is_refused():
    """The error quotes both batches and says what to write."""
    with pytest.raises(ValueError, match=r"batch 3 does not divide the effective batch 8: .*3x2"):
        expand(["fp32"], [Batch(3)], 8)


@pytest.mark.parametrize(("axis", "asked"), [([], [Batch(1)]), (["fp32"], [])], ids=["no-precision", "no-batch"])
def test_empty_axis_is_refused(axis, asked):
    """A matrix without cells is an error, because it would test nothing."""
    with pytest.raises(ValueError, match="the matrix is empty"):
        expand(axis, asked)


def test_unknown_precision_is_refused():
    """The error lists the valid modes."""
    with pytest.raises(ValueError, match=f"unknown precision 'fp8': choose from {', '.join(MODES)}"):
        expand(["fp8"], [Batch(1)])


@given(batch=batches())
def test_batch_is_read_as_it_is_written(batch):
    """`8` and `2x4` are parsed as their batch."""
    text = str(batch.per_device) if batch.accumulation is None else f"{batch.per_device}x{batch.accumulation}"
    assert parse_batch(text) == batch


@given(number=st.integers(1))
def test_batch_may_be_a_number(number):
    """A marker may give the batch as an int."""
    assert parse_batch(number) == Batch(number)


@pytest.mark.parametrize(
    "value",
    [0, -1, True, 2.0, None, "", "many", "0", "0x2", "2x0", "2x", "x2", "2x4x8", "-2", "2.5", "1e3", "٨", [2]],
    ids=repr,
)
def test_what_is_no_batch_is_refused(value):
    """The error quotes the value."""
    with pytest.raises(ValueError, match=re.escape(repr(value))):
        parse_batch(value)


@given(text=st.text(max_size=6))
def test_any_text_is_a_batch_or_refused(text):
    """Any text gives a batch of at least one row, or a ValueError."""
    try:
        batch = parse_batch(text)
    except ValueError:
        return
    assert batch.per_device >= 1
