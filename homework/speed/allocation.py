"""Memory that a training frees and takes again at every step, kept by the process in between.

glibc takes blocks of more than 32 MiB, such as logits, from the kernel one by one and gives each back as soon as it is
freed, so that every step pays for the same pages anew: 3 to 5 % of a step of SmolLM2 on a CPU.
"""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
"""Of malloc.h."""
_STEP = 256 << 20
"""Bytes by which the heap grows."""


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees; return whether its allocator can be told so, as glibc's can.

    Meant for a process that trains and ends: what is kept is not there for others.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS and musl have no such function, Windows no such library
        return False
    settings = (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, _STEP)
    return all(mallopt(name, value) for name, value in settings)
