"""Existing objects are excluded from garbage collection while a cell runs, and its own are collected at the end."""

from __future__ import annotations

import gc
import weakref

import pytest

from pytest_sftguard.engine.surroundings.garbage import set_aside


class Ring:
    """Garbage that only a collection frees."""

    def __init__(self) -> None:
        self.itself = self


def test_what_is_made_within_is_collected_at_the_end() -> None:
    """A ring of objects does not outlive the cell that made it."""
    with set_aside("cpu"):
        ring = Ring()
        seen = weakref.ref(ring)
        del ring
    assert seen() is None


def test_collections_within_pass_over_what_was_there_before() -> None:
    """Earlier garbage stays while the cell runs, and can be collected afterwards."""
    gc.collect()
    # an automatic collection could come first
    gc.disable()
    try:
        old = [Ring() for _ in range(2)]
        # moves them to the oldest generation, like imported modules
        gc.collect()
        seen = weakref.ref(old[0])
        del old
        with set_aside("cpu"):
            gc.collect()
            assert seen() is not None
        gc.collect()
        assert seen() is None
    finally:
        gc.enable()


def test_a_device_whose_memory_is_scarce_is_freed_first() -> None:
    """Garbage may hold that memory when the cell begins."""
    ring = Ring()
    gc.collect()
    seen = weakref.ref(ring)
    del ring
    with set_aside("cuda"):
        assert seen() is None


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_nothing_stays_set_aside_after_an_exception(device_type: str) -> None:
    """Objects can be collected as before."""

    def fail() -> None:
        with set_aside(device_type):
            assert gc.get_freeze_count()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert gc.get_freeze_count() == 0


def test_what_somebody_else_has_set_aside_stays_so() -> None:
    """A process that froze its objects before it forks keeps them frozen."""
    mine = [object()]
    gc.freeze()
    try:
        with set_aside("cpu"):
            pass
        # its objects are in no generation; their number may fall, as those die that nobody refers to any more
        assert all(thing is not mine for thing in gc.get_objects())
    finally:
        gc.unfreeze()
    assert any(thing is mine for thing in gc.get_objects())
