"""Reading the real machine into a HardwareProfile."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch

from pytest_sftguard.hardware import HardwareProfile

_PACKAGES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors", "pytest-sftguard")


def choose_device(asked: str) -> tuple[str, str | None]:
    """The kind of device that `asked` means here, and why it cannot be had (None if it can).

    `auto` is CUDA (or ROCm) where torch finds it, and else the CPU; other accelerators are used where they are named.
    """
    available: dict[str, Callable[[], bool]] = {
        "cuda": torch.cuda.is_available,
        "mps": torch.backends.mps.is_available,
        "xpu": torch.xpu.is_available,
        "cpu": lambda: True,
    }
    if asked == "auto":
        return ("cuda" if available["cuda"]() else "cpu"), None
    if asked not in available:
        raise ValueError(f"unknown device {asked!r}: choose from auto, {', '.join(available)}")
    if not available[asked]():
        return asked, f"torch {torch.__version__} finds no {asked} device on this machine"
    return asked, None


def probe(kind: str) -> HardwareProfile:
    """The profile of the first device of `kind` (`cuda`, `mps`, `xpu` or `cpu`), which must be there."""
    if kind == "cuda":
        properties = torch.cuda.get_device_properties(0)
        rocm = torch.version.hip is not None
        return HardwareProfile(
            kind="rocm" if rocm else "cuda",
            name=properties.name,
            count=torch.cuda.device_count(),
            total_memory_bytes=properties.total_memory,
            capability=None if rocm else f"{properties.major}.{properties.minor}",
        )
    if kind == "cpu":
        return HardwareProfile(
            kind="cpu", name=_cpu_name(), total_memory_bytes=_host_memory(), threads=torch.get_num_threads()
        )
    return HardwareProfile(kind=kind, name=kind, total_memory_bytes=None)


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that take part in a training."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return name or platform.processor() or platform.machine()


def _host_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not a POSIX system
        return None
