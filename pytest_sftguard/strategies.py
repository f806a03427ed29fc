"""Hypothesis strategies for tests of code that depends on the hardware. The only module that needs hypothesis."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable

from hypothesis import strategies as st

from pytest_sftguard.hardware import DEVICE_TYPES, GIB, KNOWN_DEVICES, QUERIES, FailedQuery, HardwareProfile

COMMON_THRESHOLDS = (10 * GIB, 20 * GIB, 40 * GIB)
"""Memory sizes at which selectors commonly switch."""

CAPABILITIES = ("8.0", "7.9", "7.5", "5.3", "5.2", "3.7", "10.0", "0.0", "99.99", "8.10", "9999.9999")
"""CUDA compute capabilities around those that matter, and absurd ones."""

ARCHITECTURES = ("gfx90a", "gfx908", "gfx906", "gfx900", "gfx942", "gfx950", "gfx1030", "gfx1036", "gfx1100", "gfx1201")
"""AMD architectures with and without bfloat16."""

TENANT_SHARE = 37
"""Percent of a shared device's memory that its usual other tenant holds."""


def hardware_profiles(
    device_types: Collection[str] = DEVICE_TYPES,
    *,
    mutated: bool = True,
    adversarial: bool = True,
    thresholds: Iterable[int] = COMMON_THRESHOLDS,
) -> st.SearchStrategy[HardwareProfile]:
    """Devices of `device_types`: real ones, plausible mutations if `mutated`, and extreme ones if `adversarial`.

    A mutation is what a shared or faulty machine reports: a driver that keeps some of the memory, a tenant who holds
    37 % of it, a driver that reports no memory, several devices. Extremes are memories of 0 bytes and of 1 byte below,
    at and above each of `thresholds`, absurd capabilities, and queries that raise. Shrinks to the plainest known device
    and prints as code. Raises ValueError if no known device has one of `device_types`.
    """
    devices = [device.profile for device in KNOWN_DEVICES.values() if device.profile.device_type in device_types]
    if not devices or not set(device_types) <= set(DEVICE_TYPES):
        raise ValueError(
            f"no devices of type {', '.join(map(repr, device_types))}: choose from {', '.join(DEVICE_TYPES)}"
        )
    real = st.sampled_from(devices)
    choices = [real]
    if mutated:
        choices.append(_mutated(real))
    if adversarial:
        sizes = [0, 1, *(limit + off for limit in thresholds for off in (-1, 0, 1)), 2**63 - 1]
        choices.append(_adversarial(real, sizes))
    return st.one_of(choices)


def _memory(profile: HardwareProfile, total: int, free: int | None = None) -> HardwareProfile:
    return dataclasses.replace(profile, total_memory_bytes=total, free_memory_bytes=free)


@st.composite
def _mutated(draw: st.DrawFn, real: st.SearchStrategy[HardwareProfile]) -> HardwareProfile:
    profile = draw(real)
    total = profile.total_memory_bytes or 0
    change = draw(st.sampled_from(("driver", "tenant", "other tenant", "zero", "several")))
    if change == "driver":
        return _memory(profile, total * draw(st.integers(91, 99)) // 100)
    if change == "tenant":
        return _memory(profile, total, total * (100 - TENANT_SHARE) // 100)
    if change == "other tenant":
        return _memory(profile, total, draw(st.integers(0, total)))
    if change == "zero":
        return _memory(profile, 0, 0)
    return dataclasses.replace(profile, count=draw(st.integers(2, 16)))


@st.composite
def _adversarial(draw: st.DrawFn, real: st.SearchStrategy[HardwareProfile], sizes: list[int]) -> HardwareProfile:
    profile = draw(real)
    if draw(st.booleans()):
        profile = _memory(profile, draw(st.sampled_from(sizes) | st.integers(0, 2**63 - 1)))
    if profile.device_type == "cuda" and draw(st.booleans()):
        profile = dataclasses.replace(profile, capability=draw(st.sampled_from(CAPABILITIES)))
    if profile.device_type == "rocm" and draw(st.booleans()):
        profile = dataclasses.replace(profile, architecture=draw(st.sampled_from(ARCHITECTURES)))
    if profile.device_type != "cpu":
        messages = st.sampled_from(("CUDA error: unknown error", "", "driver gone \N{EM DASH} 'x'"))
        failures = st.builds(FailedQuery, st.sampled_from(QUERIES), messages)
        failed = draw(st.lists(failures, max_size=2, unique_by=lambda failure: failure.query))
        profile = dataclasses.replace(profile, unanswered=tuple(failed))
    return profile
