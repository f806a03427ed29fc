"""What becomes of gradients between backward and the optimizer, from numbers alone."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from pytest_sftguard.engine.recording.received import parting
from pytest_sftguard.engine.tensors.layouts import Signs

NORMS = st.lists(st.tuples(st.floats(1e-3, 1e3), st.floats(-1, 1)), min_size=3, max_size=8)


def compared(left: list[tuple[float, float]], given_: list[tuple[float, float]]):
    """The parting of float32 tensors of 100 elements."""
    names = [f"t{i}" for i in range(len(left))]
    return parting(names, [torch.float32] * len(left), [100] * len(left), left, given_)


@given(left=NORMS, factor=st.floats(1e-3, 1))
def test_a_common_factor_parts_nothing(left, factor):
    """Clipping scales all alike."""
    left = [(norm, norm * share) for norm, share in left]
    found = compared(left, [(factor * n, factor * s) for n, s in left])
    assert found.share < 1e-12
    assert math.isclose(found.factor, factor, rel_tol=1e-9)


@given(left=NORMS, size=st.floats(1.01, 10), data=st.data())
def test_one_that_is_scaled_is_named(left, size, data):
    """The tensor that has a factor of its own."""
    left = [(norm, norm * share) for norm, share in left]
    i = data.draw(st.integers(0, len(left) - 1))
    there = [(n * size, s * size) if j == i else (n, s) for j, (n, s) in enumerate(left)]
    found = compared(left, there)
    assert found.tensor == f"t{i}"
    assert math.isclose(found.share, size - 1, rel_tol=1e-6)


def test_what_is_not_finite_is_not_compared():
    """Nor is a step without a gradient."""
    assert compared([(1.0, math.nan)], [(1.0, 0.0)]) is None
    assert compared([(0.0, 0.0)], [(0.0, 0.0)]) is None


def test_a_gradient_out_of_nothing_is_infinitely_off():
    """As where a tensor without a gradient is given one."""
    assert compared([(1.0, 0.5), (0.0, 0.0)], [(1.0, 0.5), (2.0, 1.0)]).share == math.inf


@examples(max_examples=30)
@given(length=st.sampled_from([1, 7, 1 << 16, (1 << 16) + 3, 1 << 18]), place=st.floats(0, 1))
def test_signs_see_every_element(length, place):
    """One element that changes its sign changes the sum by twice itself."""
    rows = torch.ones(2, length)
    before = Signs().total(rows)
    at = min(length - 1, int(place * length))
    rows[1, at] = -1
    after = Signs().total(rows)
    assert after[0] == before[0]
    assert abs(after[1] - before[1]) == 2
