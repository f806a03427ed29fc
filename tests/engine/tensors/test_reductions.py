"""Digests and reductions over many tensors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pytest_sftguard.engine.tensors.reductions import combined, digests, norms, to_host

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool)


@given(size=st.integers(1, 300), data=st.data(), dtype=st.sampled_from(DTYPES[:4]))
def test_one_changed_bit_changes_the_digest(size: int, data: st.DataObject, dtype: torch.dtype) -> None:
    """A digest sees the lowest bit of any element."""
    tensor = torch.linspace(-1, 1, size).to(dtype)
    changed = tensor.clone()
    integers = changed.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
    integers[data.draw(st.integers(0, size - 1))] ^= 1
    assert digests([("t", tensor)]) != digests([("t", changed)])


@given(values=st.lists(st.floats(width=32), min_size=2, max_size=40, unique_by=repr))
def test_swapped_elements_change_the_digest(values: list[float]) -> None:
    """A digest depends on the position of an element."""
    tensor = torch.tensor(values)
    swapped = tensor.flip(0)
    if not torch.equal(tensor.view(torch.int32), swapped.view(torch.int32)):
        assert digests([("t", tensor)]) != digests([("t", swapped)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_digest_is_the_same_for_any_number_of_threads(dtype: torch.dtype) -> None:
    """Integer sums have no order."""
    tensor = (torch.arange(200_000) % 1000 - 500).to(dtype)
    found = set()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.add(digests([("t", tensor)])["t"])
    assert len(found) == 1


def test_a_combined_digest_has_no_order() -> None:
    """The same tensors in another order give the same digest."""
    assert combined({"a": "1", "b": "2"}) == combined({"b": "2", "a": "1"})


@given(
    bad=st.sampled_from([math.nan, math.inf, -math.inf]), place=st.integers(0, 9), order=st.sampled_from([2, math.inf])
)
def test_a_norm_keeps_what_is_not_finite(bad: float, place: int, order: float) -> None:
    """One element that is not finite makes only its own tensor's norm not finite."""
    tensor = torch.ones(10)
    tensor[place] = bad
    good, spoilt = norms([torch.ones(10), tensor], order).tolist()
    assert math.isfinite(good)
    assert not math.isfinite(spoilt)


@given(values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40))
def test_the_largest_norm_is_the_largest_absolute_value(values: list[float]) -> None:
    """The signs do not matter."""
    assert norms([torch.tensor(values)], math.inf).tolist() == [torch.tensor(values).abs().max().item()]


def test_float16_norms_do_not_overflow() -> None:
    """Squares from 256 on exceed float16, so that the norm is computed in float32."""
    assert norms([torch.full((4,), 1000.0, dtype=torch.float16)], 2).tolist() == [2000.0]


def test_parts_reach_the_host_in_their_order() -> None:
    """One transfer is divided into its parts again; empty parts stay empty."""
    parts = [torch.tensor([1.0, 2.0]), torch.empty(0), torch.tensor([True, False])]
    assert to_host(parts) == [[1.0, 2.0], [], [1.0, 0.0]]
