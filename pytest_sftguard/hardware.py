"""HardwareProfile: a device as a value, and the table of known devices. The engine makes profiles of real devices."""

from __future__ import annotations

import dataclasses
import os
import re
from dataclasses import dataclass
from typing import Any

from pytest_sftguard.precision import PrecisionMode

AMPERE = (8, 0)
"""First CUDA compute capability with bfloat16 and tf32 in hardware (CUDA programming guide, arithmetic tables)."""

TENSOR_HALF = (5, 3)
"""First CUDA compute capability with float16 arithmetic (CUDA programming guide)."""

DEVICE_TYPES = ("cuda", "rocm", "xpu", "mps", "cpu")
"""Every device type."""

QUERIES = (
    "is_available",
    "device_count",
    "get_device_properties",
    "get_device_capability",
    "is_bf16_supported",
    "mem_get_info",
)
"""Queries to torch that can fail in a driver. On mps, `mem_get_info` stands for `recommended_max_memory`."""

_CAPABILITY = re.compile(r"[0-9]{1,4}\.[0-9]{1,4}", re.ASCII)
_ARCHITECTURE = re.compile(r"gfx[0-9]{1,4}[0-9a-f]{2}", re.ASCII)
_ROCM_BFLOAT16 = re.compile(r"gfx(908|90a|94.|95.|11..|12..)", re.ASCII)
"""AMD architectures with bfloat16 instructions: CDNA, and RDNA from 3 on (HIP documentation, hardware features).

torch cannot tell: on ROCm `is_bf16_supported()` is always true, even with `including_emulation=False`.
"""
_LEAST = {"count": 1, "threads": 1, "total_memory_bytes": 0, "free_memory_bytes": 0, "host_memory_bytes": 0}
"""Smallest value of each whole number in a profile."""


@dataclass(frozen=True)
class FailedQuery:
    """A query that raised an exception in the driver."""

    query: str
    """Name of the query, one of QUERIES."""
    message: str
    """Text of the exception."""

    def __post_init__(self) -> None:
        if self.query not in QUERIES:
            raise ValueError(f"unknown query {self.query!r}: choose from {', '.join(QUERIES)}")

    def __str__(self) -> str:
        return f"{self.query} failed: {self.message}"


@dataclass(frozen=True, kw_only=True)
class HardwareProfile:
    """One device, and the number of such devices.

    A profile keeps what a driver reports, absurd or not. Raises ValueError for what no driver reports: an unknown
    device type, a negative size, a capability that is not two numbers.
    """

    device_type: str
    """`cuda`, `rocm`, `xpu`, `mps` or `cpu`."""
    name: str
    """Name from the driver, such as `NVIDIA H100 80GB HBM3`."""
    count: int = 1
    """Number of such devices."""
    total_memory_bytes: int | None = None
    """Memory of one device, or of the host for a CPU; None if it cannot be read."""
    capability: str | None = None
    """CUDA compute capability, such as `8.0`; None elsewhere."""
    threads: int | None = None
    """Threads that one CPU operation may use; the results of reductions depend on it."""
    free_memory_bytes: int | None = None
    """Free memory of the first device; None if it cannot be read."""
    host_memory_bytes: int | None = None
    """Memory of the device's host; None if it cannot be read."""
    architecture: str | None = None
    """AMD's name for the instruction set, such as `gfx942`; None elsewhere."""
    emulates: tuple[str, ...] = ()
    """Types that an xpu or mps device only emulates; elsewhere they follow from capability or architecture."""
    unanswered: tuple[FailedQuery, ...] = ()
    """Queries that raised an exception in the driver."""

    def __post_init__(self) -> None:
        if self.device_type not in DEVICE_TYPES:
            raise ValueError(f"unknown device type {self.device_type!r}: choose from {', '.join(DEVICE_TYPES)}")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is None and name != "count":
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{name} must be a whole number, not {value!r}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}, not {value}")
        self._check_owned("capability", "cuda", _CAPABILITY, "two numbers such as 8.0")
        self._check_owned("architecture", "rocm", _ARCHITECTURE, "a name such as gfx942")
        if self.emulates and self.device_type in ("cuda", "rocm"):
            raise ValueError(
                f"emulates is for xpu and mps: on {self.device_type} it follows from capability or architecture"
            )
        for dtype in self.emulates:
            if dtype not in ("bfloat16", "float16"):
                raise ValueError(f"emulates has {dtype!r}: choose from bfloat16, float16")

    def _check_owned(self, name: str, device_type: str, pattern: re.Pattern[str], valid: str) -> None:
        value = getattr(self, name)
        if value is None:
            return
        if self.device_type != device_type:
            raise ValueError(
                f"a {self.device_type} device has no {name}, which is {device_type}'s, and this one has {value!r}"
            )
        if not isinstance(value, str) or not pattern.fullmatch(value):
            raise ValueError(f"{name} {value!r} is malformed: give {valid}")

    def __repr__(self) -> str:
        """Return code that makes the same profile, without the fields that have their defaults."""
        values = [(f.name, getattr(self, f.name), f.default) for f in dataclasses.fields(self)]
        return f"HardwareProfile({', '.join(f'{n}={value!r}' for n, value, default in values if value != default)})"

    def __str__(self) -> str:
        several = f" x{self.count}" if self.count > 1 else ""
        threads = f" ({self.threads} thread{'s' if self.threads > 1 else ''})" if self.threads else ""
        failed = f" [{'; '.join(map(str, self.unanswered))}]" if self.unanswered else ""
        return f"{self.name}{several}{threads}{failed}"

    @property
    def compute_capability(self) -> tuple[int, int] | None:
        """The capability as two numbers, or None."""
        if self.capability is None:
            return None
        major, _, minor = self.capability.partition(".")
        return int(major), int(minor)

    @property
    def is_mig_slice(self) -> bool:
        """Whether this is a slice of a GPU, which the driver names for instance `NVIDIA A100-SXM4-40GB MIG 1g.5gb`."""
        return self.device_type == "cuda" and "MIG" in self.name.split()

    @property
    def emulated(self) -> tuple[str, ...]:
        """Types that torch offers on this device and for which its hardware has no arithmetic."""
        capability = self.compute_capability
        if capability is not None:
            return tuple(d for d, first in (("bfloat16", AMPERE), ("float16", TENSOR_HALF)) if capability < first)
        if self.architecture is not None:
            return () if _ROCM_BFLOAT16.fullmatch(self.architecture) else ("bfloat16",)
        return self.emulates

    @property
    def native(self) -> tuple[str, ...]:
        """Types in which the hardware computes, with `tf32`; float32 alone if a GPU's generation is not known.

        On a CPU every type counts as native, because torch's kernels round each result as the type does, with or
        without instructions for it.
        """
        capability = self.compute_capability
        if {"cuda": capability, "rocm": self.architecture}.get(self.device_type, "known") is None:
            return ("float32",)
        tf32 = ("tf32",) if capability is not None and capability >= AMPERE else ()
        return ("float32", *tf32, *(d for d in ("bfloat16", "float16") if d not in self.emulated))

    def failure_of(self, query: str) -> FailedQuery | None:
        """The failure of `query`; None if it did not fail."""
        return next((f for f in self.unanswered if f.query == query), None)

    def lacks(self, mode: PrecisionMode) -> str | None:
        """Why this device cannot really train in `mode`; None if it can."""
        capability = self.compute_capability
        if mode.cuda_only and self.device_type != "cuda":
            return f"{mode.name} exists on NVIDIA GPUs only, and this device is {self.device_type}"
        if mode.name == "tf32" and capability is not None and capability < AMPERE:
            return f"tf32 needs compute capability 8.0, and {self.name} has {self.capability}"
        if mode.compute_dtype not in self.emulated:
            return None
        if capability is None:
            return f"{mode.compute_dtype} is only emulated on {self.name}"
        if mode.compute_dtype == "bfloat16":
            return f"bfloat16 is only emulated on {self.name}: compute capability {self.capability} is below 8.0"
        return f"float16 needs compute capability 5.3, and {self.name} has {self.capability}"


@dataclass(frozen=True, kw_only=True)
class KnownDevice:
    """A device that one can buy or rent."""

    profile: HardwareProfile
    """The device, with `total_memory_bytes` from the data sheet, in binary gigabytes.

    The figure is nominal: drivers keep 1 to 9 % of it for themselves (error correction, page tables, the display), and
    a Mac lets its GPU use about three quarters of its memory.
    """
    source: str
    """Title of the data sheet."""


GIB = 1024**3


def _known(source: str, gib: int, **fields: Any) -> KnownDevice:
    return KnownDevice(profile=HardwareProfile(total_memory_bytes=gib * GIB, **fields), source=source)


def _cuda(name: str, gib: int, capability: str, source: str, count: int = 1) -> KnownDevice:
    return _known(source, gib, device_type="cuda", name=name, capability=capability, count=count)


def _rocm(name: str, gib: int, architecture: str, source: str) -> KnownDevice:
    return _known(source, gib, device_type="rocm", name=name, architecture=architecture)


def _other(device_type: str, name: str, gib: int, source: str, *emulates: str) -> KnownDevice:
    return _known(source, gib, device_type=device_type, name=name, emulates=emulates)


_MIG_A100 = "NVIDIA Multi-Instance GPU User Guide, A100 profiles"
_MIG_H100 = "NVIDIA Multi-Instance GPU User Guide, H100 profiles"
_GEFORCE_20 = "NVIDIA Turing GPU Architecture white paper"
_GEFORCE_30 = "NVIDIA Ampere GA102 GPU Architecture white paper"
_A100 = "NVIDIA A100 Tensor Core GPU data sheet"
_V100 = "NVIDIA V100 Tensor Core GPU data sheet"
_METAL = "bfloat16 on M1 and M2 is emulated in float32 (comment in transformers' is_torch_bf16_gpu_available)"

KNOWN_DEVICES: dict[str, KnownDevice] = {
    "CPU": _other("cpu", "CPU", 16, "none: a laptop's common size"),
    "K80": _cuda("Tesla K80", 12, "3.7", "NVIDIA Tesla K80 GPU Accelerator board specification", count=2),
    "M40": _cuda("Tesla M40 24GB", 24, "5.2", "NVIDIA Tesla M40 24GB GPU Accelerator product brief"),
    "GTX 1080 Ti": _cuda("NVIDIA GeForce GTX 1080 Ti", 11, "6.1", "GeForce GTX 1080 Ti specifications"),
    "P100": _cuda("Tesla P100-PCIE-16GB", 16, "6.0", "NVIDIA Tesla P100 GPU Accelerator data sheet"),
    "V100 16GB": _cuda("Tesla V100-SXM2-16GB", 16, "7.0", _V100),
    "V100 32GB": _cuda("Tesla V100-SXM2-32GB", 32, "7.0", _V100),
    "T4": _cuda("Tesla T4", 16, "7.5", "NVIDIA T4 Tensor Core GPU data sheet"),
    "RTX 2060": _cuda("NVIDIA GeForce RTX 2060", 6, "7.5", _GEFORCE_20),
    "RTX 2080 Ti": _cuda("NVIDIA GeForce RTX 2080 Ti", 11, "7.5", _GEFORCE_20),
    "RTX 3060": _cuda("NVIDIA GeForce RTX 3060", 12, "8.6", "GeForce RTX 3060 family specifications"),
    "RTX 3090": _cuda("NVIDIA GeForce RTX 3090", 24, "8.6", _GEFORCE_30),
    "RTX 4090": _cuda("NVIDIA GeForce RTX 4090", 24, "8.9", "NVIDIA Ada GPU Architecture white paper"),
    "RTX 5090": _cuda("NVIDIA GeForce RTX 5090", 32, "12.0", "NVIDIA RTX Blackwell GPU Architecture white paper"),
    "RTX A6000": _cuda("NVIDIA RTX A6000", 48, "8.6", "NVIDIA RTX A6000 data sheet"),
    "A10": _cuda("NVIDIA A10", 24, "8.6", "NVIDIA A10 Tensor Core GPU data sheet"),
    "A100 40GB": _cuda("NVIDIA A100-SXM4-40GB", 40, "8.0", _A100),
    "A100 80GB": _cuda("NVIDIA A100-SXM4-80GB", 80, "8.0", _A100),
    "A100 40GB x8": _cuda("NVIDIA A100-SXM4-40GB", 40, "8.0", "NVIDIA DGX A100 data sheet", count=8),
    "A100 MIG 1g.5gb": _cuda("NVIDIA A100-SXM4-40GB MIG 1g.5gb", 5, "8.0", _MIG_A100),
    "A100 MIG 2g.10gb": _cuda("NVIDIA A100-SXM4-40GB MIG 2g.10gb", 10, "8.0", _MIG_A100),
    "A100 MIG 3g.20gb": _cuda("NVIDIA A100-SXM4-40GB MIG 3g.20gb", 20, "8.0", _MIG_A100),
    "A100 MIG 1g.10gb": _cuda("NVIDIA A100-SXM4-80GB MIG 1g.10gb", 10, "8.0", _MIG_A100),
    "A100 MIG 3g.40gb": _cuda("NVIDIA A100-SXM4-80GB MIG 3g.40gb", 40, "8.0", _MIG_A100),
    "H100 MIG 1g.10gb": _cuda("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 10, "9.0", _MIG_H100),
    "L4": _cuda("NVIDIA L4", 24, "8.9", "NVIDIA L4 Tensor Core GPU data sheet"),
    "L40S": _cuda("NVIDIA L40S", 48, "8.9", "NVIDIA L40S GPU data sheet"),
    "H100": _cuda("NVIDIA H100 80GB HBM3", 80, "9.0", "NVIDIA H100 Tensor Core GPU data sheet"),
    "H200": _cuda("NVIDIA H200", 141, "9.0", "NVIDIA H200 Tensor Core GPU data sheet"),
    "B200": _cuda("NVIDIA B200", 180, "10.0", "NVIDIA DGX B200 data sheet"),
    "MI210": _rocm("AMD Instinct MI210", 64, "gfx90a", "AMD Instinct MI210 Accelerator data sheet"),
    "MI300X": _rocm("AMD Instinct MI300X", 192, "gfx942", "AMD Instinct MI300X Accelerator data sheet"),
    "RX 6800 XT": _rocm("AMD Radeon RX 6800 XT", 16, "gfx1030", "AMD Radeon RX 6800 XT specifications"),
    "RX 7900 XTX": _rocm("AMD Radeon RX 7900 XTX", 24, "gfx1100", "AMD Radeon RX 7900 XTX specifications"),
    "Arc A770": _other("xpu", "Intel(R) Arc(TM) A770 Graphics", 16, "Intel Arc A770 Graphics specifications"),
    "Arc B580": _other("xpu", "Intel(R) Arc(TM) B580 Graphics", 12, "Intel Arc B580 Graphics specifications"),
    "M1": _other("mps", "Apple M1", 16, f"Mac mini (M1, 2020) technical specifications; {_METAL}", "bfloat16"),
    "M2 Max": _other("mps", "Apple M2 Max", 64, f"Mac Studio (2023) technical specifications; {_METAL}", "bfloat16"),
    "M3": _other("mps", "Apple M3", 16, "MacBook Pro (14-inch, M3, 2023) technical specifications"),
    "M3 Max": _other("mps", "Apple M3 Max", 64, "MacBook Pro (M3 Max, 2023) technical specifications"),
    "M4": _other("mps", "Apple M4", 16, "Mac mini (2024) technical specifications"),
}
"""Real devices by short name, the plainest first. CUDA capabilities: NVIDIA's list "CUDA GPU Compute Capability"."""


def device_named(name: str) -> HardwareProfile:
    """The known device with this name, in any case. Raises ValueError, which lists the names, if there is none."""
    found = {known.casefold(): device.profile for known, device in KNOWN_DEVICES.items()}
    profile = found.get(name.strip().casefold()) if isinstance(name, str) else None
    if profile is None:
        raise ValueError(f"unknown device {name!r}: choose from {', '.join(KNOWN_DEVICES)}")
    return profile


def usable_cores() -> int:
    """Number of cores that this process may use, at least 1; all of the machine's if the system does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
