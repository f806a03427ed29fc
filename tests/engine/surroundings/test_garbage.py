"""Objects that a cell finds are set aside while it runs, and what it leaves is collected."""

from __future__ import annotations

import gc
import weakref

import pytest

from pytest_sftguard.engine.surroundings.garbage import set_aside


class Ring:
    """Garbage that only a collection finds."""

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
    """Garbage of before stays while the cell runs, and is collected as ever afterwards."""
    gc.collect()
    gc.disable()  # or a collection of its own may come first
    try:
        old = [Ring() for _ in range(2)]
        gc.collect()  # as old as what was imported
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
    """What is garbage when the cell begins may hold that memory."""
    ring = Ring()
    gc.collect()
    seen = weakref.ref(ring)
    del ring
    with set_aside("cuda"):
        assert seen() is None


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_nothing_stays_set_aside_after_an_exception(device_type: str) -> None:
    """The process goes on as it was."""

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
