"""Reading the real machine into a HardwareProfile."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from pytest_sftguard.hardware import FailedQuery, HardwareProfile

_PACKAGES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors", "pytest-sftguard")


def choose_device(asked: str) -> tuple[str, str | None]:
    """The device type that `asked` means here, and why it cannot be had (None if it can).

    `auto` is CUDA (or ROCm) where torch finds it, and else the CPU; other accelerators are used where they are named.
    A driver that fails at the question is no reason to train on the CPU instead.
    """
    available: dict[str, Callable[[], bool]] = {
        "cuda": torch.cuda.is_available,
        "mps": torch.backends.mps.is_available,
        "xpu": torch.xpu.is_available,
        "cpu": lambda: True,
    }
    if asked != "auto" and asked not in available:
        raise ValueError(f"unknown device {asked!r}: choose from auto, {', '.join(available)}")
    device_type = "cuda" if asked == "auto" else asked
    try:
        there = available[device_type]()
    except Exception as error:  # whatever a broken driver raises
        return (
            device_type,
            f"torch {torch.__version__} cannot tell whether there is a {device_type} device: {_words(error)}",
        )
    if asked == "auto":
        return ("cuda" if there else "cpu"), None
    if not there:
        return asked, f"torch {torch.__version__} finds no {asked} device on this machine"
    return asked, None


def device_profile(device_type: str) -> HardwareProfile:
    """The profile of the first device of `device_type` (`cuda`, `mps`, `xpu` or `cpu`), which must be there.

    A question that raises leaves its fields None, and is told in the profile's `unanswered`.
    """
    asking = _Asking()
    host = _host_memory()
    if device_type == "cpu":
        return HardwareProfile(
            device_type="cpu", name=_cpu_name(), total_memory_bytes=host, threads=torch.get_num_threads(),
            free_memory_bytes=available_host_memory(), host_memory_bytes=host,
        )  # fmt: skip
    if device_type == "mps":
        return _probe_mps(asking, host)
    module: Any = {"cuda": torch.cuda, "xpu": torch.xpu}[device_type]
    rocm = device_type == "cuda" and torch.version.hip is not None
    count = asking.ask("device_count", module.device_count)
    properties = asking.ask("get_device_properties", lambda: module.get_device_properties(0))
    free = asking.ask("mem_get_info", lambda: int(module.mem_get_info(0)[0]))
    return HardwareProfile(
        device_type="rocm" if rocm else device_type,
        name=device_type if properties is None else properties.name,
        count=max(1, count or 1),
        total_memory_bytes=None if properties is None else properties.total_memory,
        capability=_capability(properties) if device_type == "cuda" and not rocm else None,
        architecture=_architecture(properties) if rocm else None,
        emulates=_emulated_by_xpu(properties) if device_type == "xpu" else (),
        free_memory_bytes=free,
        host_memory_bytes=host,
        unanswered=tuple(asking.failed),
    )


class _Asking:
    """Puts questions to a driver, and keeps those that it did not answer."""

    def __init__(self) -> None:
        self.failed: list[FailedQuery] = []

    def ask(self, query: str, question: Callable[[], Any]) -> Any:
        """The answer, or None."""
        try:
            return question()
        except Exception as error:  # whatever a broken driver raises
            self.failed.append(FailedQuery(query, _words(error)))
            return None


def _probe_mps(asking: _Asking, host: int | None) -> HardwareProfile:
    def memory() -> tuple[int, int]:
        total = int(torch.mps.recommended_max_memory())
        return total, max(0, total - int(torch.mps.driver_allocated_memory()))

    total, free = asking.ask("mem_get_info", memory) or (None, None)
    get_name = getattr(torch.backends.mps, "get_name", None)  # from torch 2.9 on
    name = get_name() if get_name else platform.processor() or "mps"
    return HardwareProfile(
        device_type="mps", name=name, total_memory_bytes=total, free_memory_bytes=free, host_memory_bytes=host,
        emulates=("bfloat16",) if name.startswith(("Apple M1", "Apple M2")) else (),
        unanswered=tuple(asking.failed),
    )  # fmt: skip


def _capability(properties: Any) -> str | None:
    return None if properties is None else f"{properties.major}.{properties.minor}"


def _architecture(properties: Any) -> str | None:
    """`gfx90a` of `gfx90a:sramecc+:xnack-`."""
    name = str(getattr(properties, "gcnArchName", "")).partition(":")[0]
    return name or None


def _emulated_by_xpu(properties: Any) -> tuple[str, ...]:
    return () if getattr(properties, "has_bfloat16_conversions", True) else ("bfloat16",)


def _words(error: BaseException) -> str:
    lines = str(error).splitlines() or [""]
    return lines[0][:200] or type(error).__name__


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


def available_host_memory() -> int | None:
    """What programs can still get without swapping, as Linux reckons it; None elsewhere."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        return None
