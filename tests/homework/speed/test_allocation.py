"""Memory that is freed and taken again."""

from __future__ import annotations

import ctypes
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from homework.speed import allocation

ROOT = Path(__file__).resolve().parents[3]
COUNTED = """
import resource, sys
from homework.speed.allocation import keep_freed_memory
if sys.argv[1] == "kept" and not keep_freed_memory():
    sys.exit("cannot be told")
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
b"x" * (64 << 20)
before = faults()
for _ in range(4):
    b"x" * (64 << 20)
print(faults() - before)
"""


def faults(how: str) -> int:
    """Page faults of four blocks of 64 MiB, as logits are, each freed before the next, by the system's malloc."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD"))}
    command = [sys.executable, "-c", COUNTED, how]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if "cannot be told" in done.stderr:
        pytest.skip("another allocator")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="page faults are counted otherwise")
def test_what_is_freed_is_not_taken_from_the_kernel_again() -> None:
    """Each block costs its pages anew, 16,384 of them or fewer where pages are larger, unless they are kept."""
    freed, kept = faults("freed"), faults("kept")
    if freed < 64:
        pytest.skip("this kernel maps pages so large that there is nothing to save")
    assert kept < freed / 10


@pytest.mark.parametrize("error", [AttributeError, OSError, TypeError])
def test_another_allocator_is_left_alone(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is nothing to tell it, nothing happens."""

    def lacks(name: object) -> object:
        raise error

    monkeypatch.setattr(ctypes, "CDLL", lacks)
    assert allocation.keep_freed_memory() is False


def test_the_command_keeps_what_it_frees(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """And the library does not: `main` may be called in any process."""
    told: list[int] = []
    monkeypatch.setattr(allocation, "keep_freed_memory", lambda: told.append(1))
    monkeypatch.setattr(sys, "argv", ["homework.sft", "--help"])
    monkeypatch.delitem(sys.modules, "homework.sft", raising=False)
    with pytest.raises(SystemExit):
        runpy.run_module("homework.sft", run_name="__main__")
    assert "Usage" in capsys.readouterr().out
    assert told
