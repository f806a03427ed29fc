"""Room for frames: calls within it ask the system for no memory, however deep they lie."""

from __future__ import annotations

import sys

import pytest

from pytest_sftguard.engine.surroundings.frames import with_room

resource = pytest.importorskip("resource", reason="there are no page faults to count")
CALLS = 300


def deep(depth: int) -> int:
    """Calls itself `depth` times."""
    return 0 if depth == 0 else 1 + deep(depth - 1)


def test_a_call_gives_what_the_function_gives() -> None:
    """With its arguments, and its exceptions."""
    assert with_room(deep, 500) == 500
    with pytest.raises(ZeroDivisionError):
        with_room(divmod, 1, 0)


def most_faults() -> int:
    """Page faults of `CALLS` calls, at the worst of many depths."""

    def faults() -> int:
        return int(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)

    def at(left: int) -> int:
        if left:
            return at(left - 1)
        before = faults()
        for _ in range(CALLS):
            deep(3)
        return faults() - before

    return max(at(depth) for depth in range(200))


@pytest.mark.skipif(sys.version_info < (3, 11), reason="a frame is an object of its own there")
def test_calls_at_no_depth_ask_for_memory() -> None:
    """Without room there is a depth at which each of them does, unless this Python keeps a piece in reserve."""
    assert with_room(most_faults) < CALLS / 10
