"""HardwareProfile: what a device is, as a value. Pure: reading the real machine is the engine's work."""

from __future__ import annotations

from dataclasses import dataclass

from pytest_sftguard.precision import PrecisionMode

AMPERE = (8, 0)
"""First CUDA compute capability with bfloat16 and tf32 in hardware (CUDA programming guide, arithmetic tables)."""

TENSOR_HALF = (5, 3)
"""First CUDA compute capability with float16 arithmetic (CUDA programming guide)."""


@dataclass(frozen=True, kw_only=True)
class HardwareProfile:
    """One device, and how many of it there are."""

    kind: str
    """`cuda`, `rocm`, `xpu`, `mps` or `cpu`."""
    name: str
    """Name that the driver gives, such as `NVIDIA H100 80GB HBM3`."""
    count: int = 1
    """Number of such devices."""
    total_memory_bytes: int | None = None
    """Memory of one device; for a CPU, of the host; None if it cannot be read."""
    capability: str | None = None
    """CUDA compute capability, such as `8.0`; None elsewhere."""
    threads: int | None = None
    """Threads that one operation may use on a CPU: reductions differ with it."""

    def __str__(self) -> str:
        several = f" x{self.count}" if self.count > 1 else ""
        threads = f" ({self.threads} threads)" if self.threads else ""
        return f"{self.name}{several}{threads}"

    @property
    def compute_capability(self) -> tuple[int, int] | None:
        """The capability as numbers, or None."""
        if self.capability is None:
            return None
        major, _, minor = self.capability.partition(".")
        return int(major), int(minor or 0)

    def lacks(self, mode: PrecisionMode) -> str | None:
        """Why this device cannot train in `mode` for real; None if it can."""
        capability = self.compute_capability
        if mode.cuda_only and self.kind != "cuda":
            return f"{mode.name} exists on NVIDIA GPUs only, and this device is {self.kind}"
        if capability is None:
            return None
        if mode.name == "tf32" and capability < AMPERE:
            return f"tf32 needs compute capability 8.0, and {self.name} has {self.capability}"
        if mode.compute_dtype == "bfloat16" and capability < AMPERE:
            return f"bfloat16 is only emulated on {self.name}: compute capability {self.capability} is below 8.0"
        if mode.compute_dtype == "float16" and capability < TENSOR_HALF:
            return f"float16 needs compute capability 5.3, and {self.name} has {self.capability}"
        return None
