"""HardwareProfiles of the real machine's devices, and the versions of its libraries."""

from __future__ import annotations

import platform
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from pytest_sftguard.engine.surroundings.errors import first_line
from pytest_sftguard.hardware import FailedQuery, HardwareProfile

_PACKAGES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors", "pytest-sftguard")


def choose_device(asked: str) -> tuple[str, str | None]:
    """The device type that `asked` means on this machine, and why it is not available (None if it is).

    `auto` is CUDA (or ROCm) if torch finds it, and the CPU otherwise; other accelerators are used only if they are
    named. A driver that fails at the query is no reason to train on the CPU. Raises ValueError for an unknown device.
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
    # a broken driver may raise anything
    except Exception as error:
        reason = f"torch {torch.__version__} cannot tell whether there is a {device_type} device: {_text(error)}"
        return device_type, reason
    if asked == "auto":
        return ("cuda" if there else "cpu"), None
    return asked, None if there else f"torch {torch.__version__} finds no {asked} device on this machine"


def device_profile(device_type: str) -> HardwareProfile:
    """The profile of the first device of `device_type` (`cuda`, `mps`, `xpu` or `cpu`), which must be available.

    The fields of a query that raises stay None, and the profile's `unanswered` has the query.
    """
    queries = _Queries()
    memory = psutil.virtual_memory()
    if device_type == "cpu":
        return HardwareProfile(
            device_type="cpu",
            name=_cpu_name(),
            total_memory_bytes=memory.total,
            threads=torch.get_num_threads(),
            free_memory_bytes=memory.available,
            host_memory_bytes=memory.total,
        )
    if device_type == "mps":
        return _mps_profile(queries, memory.total)
    module: Any = {"cuda": torch.cuda, "xpu": torch.xpu}[device_type]
    rocm = device_type == "cuda" and torch.version.hip is not None
    count = queries.ask("device_count", module.device_count)
    properties = queries.ask("get_device_properties", lambda: module.get_device_properties(0))
    free = queries.ask("mem_get_info", lambda: int(module.mem_get_info(0)[0]))
    return HardwareProfile(
        device_type="rocm" if rocm else device_type,
        name=device_type if properties is None else properties.name,
        count=max(1, count or 1),
        total_memory_bytes=None if properties is None else properties.total_memory,
        capability=_capability(properties) if device_type == "cuda" and not rocm else None,
        architecture=_architecture(properties) if rocm else None,
        emulates=_emulated_by_xpu(properties) if device_type == "xpu" else (),
        free_memory_bytes=free,
        host_memory_bytes=memory.total,
        unanswered=tuple(queries.failed),
    )


class _Queries:
    """Queries to a driver, and a list of those that failed."""

    def __init__(self) -> None:
        self.failed: list[FailedQuery] = []

    def ask(self, name: str, query: Callable[[], Any]) -> Any:
        """Result of the query, or None if it raises."""
        try:
            return query()
        # a broken driver may raise anything
        except Exception as error:
            self.failed.append(FailedQuery(name, _text(error)))
            return None


def _mps_profile(queries: _Queries, host_memory: int) -> HardwareProfile:
    def memory() -> tuple[int, int]:
        total = int(torch.mps.recommended_max_memory())
        return total, max(0, total - int(torch.mps.driver_allocated_memory()))

    total, free = queries.ask("mem_get_info", memory) or (None, None)
    # from torch 2.9 on
    get_name = getattr(torch.backends.mps, "get_name", None)
    name = get_name() if get_name else platform.processor() or "mps"
    return HardwareProfile(
        device_type="mps",
        name=name,
        total_memory_bytes=total,
        free_memory_bytes=free,
        host_memory_bytes=host_memory,
        emulates=("bfloat16",) if name.startswith(("Apple M1", "Apple M2")) else (),
        unanswered=tuple(queries.failed),
    )


def _capability(properties: Any) -> str | None:
    return None if properties is None else f"{properties.major}.{properties.minor}"


def _architecture(properties: Any) -> str | None:
    """`gfx90a` of `gfx90a:sramecc+:xnack-`."""
    name = str(getattr(properties, "gcnArchName", "")).partition(":")[0]
    return name or None


def _emulated_by_xpu(properties: Any) -> tuple[str, ...]:
    return () if getattr(properties, "has_bfloat16_conversions", True) else ("bfloat16",)


def _text(error: BaseException) -> str:
    return first_line(error)[:200] or type(error).__name__


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
