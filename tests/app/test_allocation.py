"""Memory that is freed and taken again."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import sys

import pytest

from homework import allocation

COUNTED = """
import resource
from homework.allocation import keep_freed_memory
{first}
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
bytearray(64 << 20)
before = faults()
for _ in range(4):
    bytearray(64 << 20)
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_what_is_freed_is_not_taken_from_the_kernel_again() -> None:
    """Blocks of 64 MiB, as logits are, cost their pages once: 16,384 of them, or fewer where pages are larger."""

    def faults(first: str) -> int:
        code = COUNTED.format(first=first)
        return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)

    assert faults("keep_freed_memory()") < faults("") / 10


@pytest.mark.parametrize("error", [AttributeError, OSError, TypeError])
def test_another_allocator_is_left_alone(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is nothing to tell it, nothing happens."""

    def lacks(name: object) -> object:
        raise error

    monkeypatch.setattr(ctypes, "CDLL", lacks)
    assert allocation.keep_freed_memory() is False
