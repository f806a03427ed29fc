"""Memory sizes, and the search for the largest batch that fits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_sftguard.sizes import fits, format_bytes, largest, parse_bytes, shortage

GIB = 2**30


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("15.8GiB", int(15.8 * GIB)),
        ("16 GB", 16 * 10**9),
        ("512mib", 512 * 2**20),
        ("7", 7),
        ("0 B", 0),
        ("1TiB", 2**40),
    ],
)
def test_a_size_is_read(text: str, size: int) -> None:
    """Numbers with and without a unit, in any case, with or without a space."""
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "nan", "inf", "1e9", "12 parsecs", "1GiB2", "٣GiB"])
def test_any_other_text_is_refused(text: str) -> None:
    """The error quotes the text and says what to write."""
    with pytest.raises(ValueError, match="give a size of memory: a number and B, KiB"):
        parse_bytes(text)


@given(st.integers(0, 2**50))
def test_a_size_reads_back_nearly_as_it_was(size: int) -> None:
    """The formatted number is within a twentieth of the size."""
    assert parse_bytes(format_bytes(size)) == pytest.approx(size, rel=0.051)


def test_the_message_says_need_and_have() -> None:
    """The message is the cell's reason in the report."""
    found = shortage(int(23.1 * GIB), int(15.8 * GIB), 0.1)
    assert found == "needs 23.1 GiB of 15.8 GiB free, of which 10% is left as a margin"


@given(need=st.integers(0, 2**45), free=st.integers(0, 2**45), margin=st.floats(0, 0.99))
def test_what_fits_leaves_the_margin(need: int, free: int, margin: float) -> None:
    """A need that fits is at most the free memory, and exactly the others have a reason."""
    assert (shortage(need, free, margin) is None) == fits(need, free, margin)
    assert not fits(need, free, margin) or need <= free


@given(steps=st.lists(st.integers(0, 10**6), min_size=1, max_size=200), budget=st.integers(0, 10**8))
def test_the_largest_is_what_trying_all_would_find(steps: list[int], budget: int) -> None:
    """The peak may be any that does not fall with the batch, linear or not."""
    peaks = [sum(steps[: i + 1]) for i in range(len(steps))]
    assert largest(lambda batch: peaks[batch - 1], budget, len(peaks)) == sum(p <= budget for p in peaks)


@given(base=st.integers(0, 10**10), slope=st.integers(1, 10**8), budget=st.integers(0, 10**11))
def test_a_linear_peak_needs_few_calls(base: int, slope: int, budget: int) -> None:
    """Each call is a rehearsal of seconds; a linear peak takes at most five."""
    asked: list[int] = []

    def peak(batch: int) -> int:
        asked.append(batch)
        return base + slope * batch

    largest(peak, budget, 1024)
    assert len(asked) <= 5
