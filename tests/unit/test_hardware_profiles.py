"""HardwareProfile: invalid values, derived values, the table of known devices, the strategies."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import find, given, settings

from pytest_sftguard.hardware import (
    DEVICE_TYPES,
    GIB,
    KNOWN_DEVICES,
    QUERIES,
    FailedQuery,
    HardwareProfile,
    KnownDevice,
    device_named,
)
from pytest_sftguard.precision import MODES, mode_named
from pytest_sftguard.records import RecordError, RunRecord
from pytest_sftguard.strategies import COMMON_THRESHOLDS, TENANT_SHARE, hardware_profiles
from tests.support import canned

T4 = device_named("T4")
UNKNOWN = [HardwareProfile(device_type=device_type, name="?") for device_type in DEVICE_TYPES]


def exactly(message: str) -> str:
    return f"^{re.escape(message)}$"


def cuda(**fields: Any) -> HardwareProfile:
    return HardwareProfile(**{"device_type": "cuda", "name": "GPU"} | fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"device_type": "gpu"}, "unknown device type 'gpu': choose from cuda, rocm, xpu, mps, cpu"),
        ({"total_memory_bytes": -1}, "total_memory_bytes must be at least 0, not -1"),
        ({"free_memory_bytes": -5}, "free_memory_bytes must be at least 0, not -5"),
        ({"host_memory_bytes": -1}, "host_memory_bytes must be at least 0, not -1"),
        ({"total_memory_bytes": 1.5}, "total_memory_bytes must be a whole number, not 1.5"),
        ({"total_memory_bytes": True}, "total_memory_bytes must be a whole number, not True"),
        ({"count": 0}, "count must be at least 1, not 0"),
        ({"count": None}, "count must be a whole number, not None"),
        ({"threads": 0}, "threads must be at least 1, not 0"),
        ({"capability": "8"}, "capability '8' is malformed: give two numbers such as 8.0"),
        ({"capability": "8.0.1"}, "capability '8.0.1' is malformed: give two numbers such as 8.0"),
        ({"capability": "sm_80"}, "capability 'sm_80' is malformed: give two numbers such as 8.0"),
        ({"capability": "-8.0"}, "capability '-8.0' is malformed: give two numbers such as 8.0"),
        ({"capability": (8, 0)}, "capability (8, 0) is malformed: give two numbers such as 8.0"),
        (
            {"device_type": "mps", "capability": "8.0"},
            "a mps device has no capability, which is cuda's, and this one has '8.0'",
        ),
        ({"architecture": "gfx942"}, "a cuda device has no architecture, which is rocm's, and this one has 'gfx942'"),
        (
            {"device_type": "rocm", "architecture": "gfx94x"},
            "architecture 'gfx94x' is malformed: give a name such as gfx942",
        ),
        (
            {"emulates": ("bfloat16",)},
            "emulates is for xpu and mps: on cuda it follows from capability or architecture",
        ),
        (
            {"device_type": "rocm", "emulates": ("bfloat16",)},
            "emulates is for xpu and mps: on rocm it follows from capability or architecture",
        ),
        ({"device_type": "mps", "emulates": ("bf16",)}, "emulates has 'bf16': choose from bfloat16, float16"),
    ],
)
def test_a_profile_that_no_device_has_is_refused(fields: dict[str, Any], message: str) -> None:
    """The message names the field, quotes its value, and says what is valid."""
    with pytest.raises(ValueError, match=exactly(message)):
        cuda(**fields)


def test_the_least_and_the_absurd_are_accepted() -> None:
    """A driver may report no memory, and any capability of two numbers."""
    profile = cuda(total_memory_bytes=0, free_memory_bytes=0, host_memory_bytes=0, capability="9999.0", threads=1)
    assert profile.compute_capability == (9999, 0)
    assert HardwareProfile(device_type="xpu", name="x", emulates=("bfloat16", "float16")).native == ("float32",)


def test_fields_are_named() -> None:
    """Positional texts would be confused with each other."""
    with pytest.raises(TypeError):
        HardwareProfile("cuda", "GPU")  # type: ignore[misc]
    with pytest.raises(TypeError):
        KnownDevice(T4, "a data sheet")  # type: ignore[misc]


@pytest.mark.parametrize("value", [T4, KNOWN_DEVICES["T4"], FailedQuery("device_count", "gone")])
def test_values_do_not_change(value: Any) -> None:
    """The table shares them."""
    field = next(iter(vars(value)))
    with pytest.raises(AttributeError):
        setattr(value, field, "other")


def test_an_unknown_query_is_refused() -> None:
    """The message lists the queries."""
    with pytest.raises(ValueError, match=exactly(f"unknown query 'memory': choose from {', '.join(QUERIES)}")):
        FailedQuery("memory", "gone")


def a_record(device: HardwareProfile) -> RunRecord:
    return dataclasses.replace(canned.healthy(), device=device)


@given(hardware_profiles())
def test_a_record_keeps_the_profile(profile: HardwareProfile) -> None:
    """Every field survives the file format."""
    record = a_record(profile)
    assert RunRecord.from_dict(json.loads(json.dumps(record.to_dict()))).device == profile


@pytest.mark.parametrize("profile", [*(d.profile for d in KNOWN_DEVICES.values()), *UNKNOWN])
def test_a_profile_that_was_read_tells_the_same(profile: HardwareProfile) -> None:
    """Equal texts that are other objects give the same results."""
    read = RunRecord.from_dict(json.loads(json.dumps(a_record(profile).to_dict()))).device
    assert (read.native, read.emulated, read.is_mig_slice) == (profile.native, profile.emulated, profile.is_mig_slice)
    assert [read.lacks(mode) for mode in MODES.values()] == [profile.lacks(mode) for mode in MODES.values()]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("total_memory_bytes", -1, "record.device: total_memory_bytes must be at least 0, not -1"),
        ("device_type", "abacus", "record.device: unknown device type 'abacus': choose from cuda, rocm, xpu, mps, cpu"),
        ("capability", "eight", "record.device: capability 'eight' is malformed: give two numbers such as 8.0"),
    ],
)
def test_a_corrupt_profile_is_a_record_error(field: str, value: Any, message: str) -> None:
    """A profile with negative memory is refused on reading, with its path in the record."""
    data = a_record(T4).to_dict()
    data["device"][field] = value
    with pytest.raises(RecordError) as caught:
        RunRecord.from_dict(data)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("profile", "native", "emulated"),
    [
        (cuda(capability="3.7"), "float32", "bfloat16 float16"),
        (cuda(capability="5.2"), "float32", "bfloat16 float16"),
        (cuda(capability="5.3"), "float32 float16", "bfloat16"),
        (cuda(capability="7.5"), "float32 float16", "bfloat16"),
        (cuda(capability="7.99"), "float32 float16", "bfloat16"),
        (cuda(capability="8.0"), "float32 tf32 bfloat16 float16", ""),
        (cuda(capability="12.0"), "float32 tf32 bfloat16 float16", ""),
        (cuda(), "float32", ""),
        (HardwareProfile(device_type="rocm", name="x"), "float32", ""),
        (HardwareProfile(device_type="rocm", name="x", architecture="gfx906"), "float32 float16", "bfloat16"),
        (HardwareProfile(device_type="rocm", name="x", architecture="gfx1030"), "float32 float16", "bfloat16"),
        (HardwareProfile(device_type="rocm", name="x", architecture="gfx90a"), "float32 bfloat16 float16", ""),
        (HardwareProfile(device_type="rocm", name="x", architecture="gfx942"), "float32 bfloat16 float16", ""),
        (HardwareProfile(device_type="rocm", name="x", architecture="gfx1100"), "float32 bfloat16 float16", ""),
        (HardwareProfile(device_type="xpu", name="x"), "float32 bfloat16 float16", ""),
        (HardwareProfile(device_type="mps", name="x", emulates=("bfloat16",)), "float32 float16", "bfloat16"),
        (HardwareProfile(device_type="cpu", name="x"), "float32 bfloat16 float16", ""),
    ],
)
def test_native_and_emulated_types(profile: HardwareProfile, native: str, emulated: str) -> None:
    """They follow from the capability, AMD's architecture or `emulates`; an unknown type is neither."""
    assert " ".join(profile.native) == native
    assert " ".join(profile.emulated) == emulated


@pytest.mark.parametrize(
    ("profile", "mode", "reason"),
    [
        (T4, "bf16-mixed", "bfloat16 is only emulated on Tesla T4: compute capability 7.5 is below 8.0"),
        (T4, "bf16-true", "bfloat16 is only emulated on Tesla T4: compute capability 7.5 is below 8.0"),
        (T4, "fp16-mixed", None),
        (T4, "fp32", None),
        (T4, "tf32", "tf32 needs compute capability 8.0, and Tesla T4 has 7.5"),
        (device_named("M40"), "fp16-true", "float16 needs compute capability 5.3, and Tesla M40 24GB has 5.2"),
        (device_named("M40"), "fp16-mixed", "float16 needs compute capability 5.3, and Tesla M40 24GB has 5.2"),
        (device_named("H100"), "tf32", None),
        (device_named("A100 40GB"), "tf32", None),
        (device_named("A100 40GB"), "bf16-true", None),
        (device_named("H100"), "bf16-mixed", None),
        (cuda(), "tf32", None),
        (device_named("CPU"), "bf16-mixed", None),
        (device_named("CPU"), "tf32", "tf32 exists on NVIDIA GPUs only, and this device is cpu"),
        (device_named("M3"), "tf32", "tf32 exists on NVIDIA GPUs only, and this device is mps"),
        (device_named("MI300X"), "tf32", "tf32 exists on NVIDIA GPUs only, and this device is rocm"),
        (device_named("M1"), "bf16-mixed", "bfloat16 is only emulated on Apple M1"),
        (device_named("RX 6800 XT"), "bf16-mixed", "bfloat16 is only emulated on AMD Radeon RX 6800 XT"),
        (device_named("MI300X"), "bf16-mixed", None),
    ],
)
def test_what_a_device_lacks(profile: HardwareProfile, mode: str, reason: str | None) -> None:
    """The reason says whether the hardware only emulates the type of the mode."""
    assert profile.lacks(mode_named(mode)) == reason


@pytest.mark.parametrize(
    ("profile", "text"),
    [
        (T4, "Tesla T4"),
        (cuda(count=2), "GPU x2"),
        (HardwareProfile(device_type="cpu", name="CPU", threads=1), "CPU (1 thread)"),
        (HardwareProfile(device_type="cpu", name="CPU", threads=2), "CPU (2 threads)"),
        (cuda(unanswered=(FailedQuery("mem_get_info", "gone"),)), "GPU [mem_get_info failed: gone]"),
        (
            cuda(unanswered=(FailedQuery("mem_get_info", "gone"), FailedQuery("device_count", "away"))),
            "GPU [mem_get_info failed: gone; device_count failed: away]",
        ),
    ],
)
def test_how_a_profile_reads(profile: HardwareProfile, text: str) -> None:
    """As in the report: name, number, threads, and failed queries."""
    assert str(profile) == text


def test_a_profile_finds_its_failures() -> None:
    """It returns a failure by the query's name."""
    failure = FailedQuery("device_count", "away")
    profile = cuda(unanswered=(FailedQuery("mem_get_info", "gone"), failure))
    assert profile.failure_of("_".join(["device", "count"])) is failure
    assert profile.failure_of("is_available") is None


def test_mig_slices_are_known_by_their_name() -> None:
    """The driver names them so; a name that merely contains the letters does not count."""
    assert device_named("A100 MIG 1g.5gb").is_mig_slice
    assert not device_named("A100 40GB").is_mig_slice
    assert not cuda(name="NVIDIA MIGHTY").is_mig_slice
    for device_type in ("cpu", "rocm", "mps", "xpu"):
        assert not HardwareProfile(device_type=device_type, name="MIG").is_mig_slice


@pytest.mark.parametrize("known", KNOWN_DEVICES.values(), ids=KNOWN_DEVICES)
def test_each_known_device_is_whole(known: KnownDevice) -> None:
    """It has a device type, a nominal memory in binary gigabytes, what its precisions follow from, and a source."""
    profile = known.profile
    assert profile.total_memory_bytes
    assert profile.total_memory_bytes % GIB == 0
    assert (profile.capability is not None) == (profile.device_type == "cuda")
    assert (profile.architecture is not None) == (profile.device_type == "rocm")
    assert profile.free_memory_bytes is None
    assert known.source


def test_the_table_is_wide() -> None:
    """It has at least 25 devices of every device type, the plainest first, with the common sizes."""
    assert len(KNOWN_DEVICES) >= 25
    assert {d.profile.device_type for d in KNOWN_DEVICES.values()} == set(DEVICE_TYPES)
    assert next(iter(KNOWN_DEVICES)) == "CPU"
    gib = {name: (d.profile.total_memory_bytes or 0) // GIB for name, d in KNOWN_DEVICES.items()}
    assert gib["T4"] == 16
    assert gib["H100"] == 80
    assert gib["A100 MIG 2g.10gb"] == 10
    assert KNOWN_DEVICES["A100 40GB x8"].profile.count == 8


def test_a_device_is_found_by_name_in_any_case() -> None:
    """Spaces around the name do not matter either."""
    assert device_named(" rtx 2080 ti ") == KNOWN_DEVICES["RTX 2080 Ti"].profile


@pytest.mark.parametrize("name", ["T5", "", None, 4])
def test_an_unknown_device_is_told_with_all_names(name: Any) -> None:
    """The error quotes the name, and lists the valid ones."""
    with pytest.raises(ValueError, match=exactly(f"unknown device {name!r}: choose from {', '.join(KNOWN_DEVICES)}")):
        device_named(name)


@given(hardware_profiles())
def test_a_profile_prints_as_code(profile: HardwareProfile) -> None:
    """Hypothesis' output for a failure can be pasted into a test."""
    assert eval(repr(profile), {"HardwareProfile": HardwareProfile, "FailedQuery": FailedQuery}) == profile


def test_the_code_of_a_profile_is_short() -> None:
    """Fields that have their defaults are left out."""
    code = "HardwareProfile(device_type='cuda', name='Tesla T4', total_memory_bytes=17179869184, capability='7.5')"
    assert repr(T4) == code


@given(hardware_profiles(("cuda", "mps"), mutated=False, adversarial=False))
def test_real_devices_alone_can_be_had(profile: HardwareProfile) -> None:
    """Without mutations every profile is in the table, with one of the requested device types."""
    assert profile in [d.profile for d in KNOWN_DEVICES.values()]
    assert profile.device_type in ("cuda", "mps")


@pytest.mark.parametrize("types", [(), ("gpu",), ("cuda", "tpu")])
def test_unknown_device_types_are_refused(types: tuple[str, ...]) -> None:
    """An empty strategy would pass every test."""
    with pytest.raises(ValueError, match="choose from cuda, rocm, xpu, mps, cpu"):
        hardware_profiles(types)


def test_the_table_needs_no_torch() -> None:
    """Profiles and strategies are pure."""
    code = "import sys, pytest_sftguard.strategies; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_own_thresholds_are_used() -> None:
    """The strategy has memories around them."""
    profiles = hardware_profiles(("cuda",), thresholds=[777])
    assert {
        find(profiles, lambda p, size=size: p.total_memory_bytes == size).device_type for size in (776, 777, 778)
    } == {"cuda"}


@pytest.mark.parametrize(("types", "plainest"), [(DEVICE_TYPES, "CPU"), (("cuda",), "K80"), (("mps", "rocm"), "MI210")])
def test_profiles_shrink_to_the_plainest(types: tuple[str, ...], plainest: str) -> None:
    """It is the first known device of the device types."""
    assert find(hardware_profiles(types), lambda p: True) == device_named(plainest)


@pytest.mark.parametrize(
    "wanted",
    [
        lambda p: p.total_memory_bytes == 0 and p.device_type == "cuda",
        lambda p: p.free_memory_bytes and p.free_memory_bytes == p.total_memory_bytes * (100 - TENANT_SHARE) // 100,
        lambda p: p.unanswered,
        lambda p: p.count > 1 and p.device_type == "mps",
        lambda p: p.capability == "99.99",
        lambda p: p.architecture == "gfx1201",
        *(
            lambda p, size=limit + off: p.total_memory_bytes == size and p.device_type == "cuda"
            for limit in COMMON_THRESHOLDS
            for off in (-1, 1)
        ),
    ],
)
def test_the_strategy_reaches_what_it_promises(wanted: Any) -> None:
    """Zero memory, a tenant, failing queries, several devices, absurd capabilities, one byte around each threshold."""
    assert find(hardware_profiles(), wanted, settings=settings(max_examples=5_000, database=None))
