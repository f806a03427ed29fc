"""Let the process keep the memory that each training step frees and allocates again.

glibc gets blocks of more than 32 MiB, such as logits, from the kernel and returns each as soon as it is freed, so every
step pays for the same pages again: 3 to 5 % of a step of SmolLM2 on a CPU.
"""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
"""Parameters of mallopt, from malloc.h."""
_STEP = 256 << 20
"""Bytes by which the heap grows."""


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees; return whether its allocator supports that, as glibc's does.

    Meant for a process that trains and ends: other processes cannot use what it keeps.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    # macOS and musl have no such function, Windows has no such library
    except (AttributeError, OSError, TypeError):
        return False
    settings = (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, _STEP)
    return all(mallopt(name, value) for name, value in settings)
