"""Hardware and precision: what a device cannot do for real, and what the modes promise."""

from __future__ import annotations

import pytest
from hypothesis import given

from pytest_sftguard.hardware import HardwareProfile
from pytest_sftguard.precision import MODES, mode_named
from tests.strategies import devices, precisions
from tests.support import canned

MAXWELL = HardwareProfile(device_type="cuda", name="GeForce GTX 970", capability="5.2")
ROCM = HardwareProfile(device_type="rocm", name="AMD Instinct MI300X")
MPS = HardwareProfile(device_type="mps", name="mps")


@pytest.mark.parametrize(
    ("device", "mode", "said"),
    [
        pytest.param(canned.CPU, "tf32", "exists on NVIDIA GPUs only, and this device is cpu", id="tf32-cpu"),
        pytest.param(MPS, "tf32", "exists on NVIDIA GPUs only, and this device is mps", id="tf32-mps"),
        pytest.param(ROCM, "tf32", "exists on NVIDIA GPUs only, and this device is rocm", id="tf32-rocm"),
        pytest.param(canned.T4, "tf32", "tf32 needs compute capability 8.0, and Tesla T4 has 7.5", id="tf32-t4"),
        pytest.param(canned.T4, "bf16-mixed", "only emulated on Tesla T4", id="bf16-mixed-t4"),
        pytest.param(canned.T4, "bf16-true", "only emulated on Tesla T4", id="bf16-true-t4"),
        pytest.param(MAXWELL, "fp16-mixed", "float16 needs compute capability 5.3", id="fp16-mixed-maxwell"),
        pytest.param(MAXWELL, "fp16-true", "float16 needs compute capability 5.3", id="fp16-true-maxwell"),
    ],
)
def test_device_lacks_a_mode(device, mode, said):
    """A mode that a device only emulates, or does not have, is refused with the reason."""
    assert said in device.lacks(MODES[mode])


@pytest.mark.parametrize("mode", MODES)
def test_hopper_lacks_nothing(mode):
    """An H100 has every mode in hardware."""
    assert canned.H100.lacks(MODES[mode]) is None


@pytest.mark.parametrize("mode", [m for m in MODES if m != "tf32"])
def test_cpu_lacks_only_tf32(mode):
    """A CPU can train in every mode but tf32."""
    assert canned.CPU.lacks(MODES[mode]) is None


def test_minor_version_counts_as_a_number():
    """Compute capability 10.0 is above 8.0, and not below it as a text would be."""
    assert HardwareProfile(device_type="cuda", name="B200", capability="10.0").lacks(MODES["bf16-mixed"]) is None


@given(device=devices(), precision=precisions())
def test_reason_names_the_mode_or_its_type(device, precision):
    """Whatever a device lacks, the reason names the mode, or the type that it computes in."""
    mode = MODES[precision]
    reason = device.lacks(mode)
    assert reason is None or mode.name in reason or mode.compute_dtype in reason


@given(device=devices())
def test_float32_is_everywhere(device):
    """Every device can train in float32."""
    assert device.lacks(MODES["fp32"]) is None


@pytest.mark.parametrize(
    ("device", "text"),
    [(canned.H100, "NVIDIA H100 x2"), (canned.CPU, "Some CPU (1 thread)"), (canned.T4, "Tesla T4")],
    ids=["several", "threads", "one"],
)
def test_device_reads_as_text(device, text):
    """The text of a device tells its name, its number and its threads."""
    assert str(device) == text


@pytest.mark.parametrize("name", MODES)
def test_mode_is_found_by_its_name(name):
    """The table is keyed by the names of its rows."""
    assert mode_named(name).name == name


@pytest.mark.parametrize("name", ["fp8", "", "FP32", None, ["fp32"]], ids=repr)
def test_unknown_mode_lists_the_modes(name):
    """The error quotes the name and lists those that there are."""
    with pytest.raises(ValueError, match=f"unknown precision .*: choose from {', '.join(MODES)}"):
        mode_named(name)


@pytest.mark.parametrize("mode", MODES.values(), ids=lambda m: m.name)
def test_name_says_weights_and_compute(mode):
    """A `-true` mode computes in the type of its weights, a `-mixed` one keeps float32 weights and uses autocast."""
    kind = mode.name.rpartition("-")[2]
    expected = {"true": (mode.compute_dtype, False), "mixed": ("float32", True)}.get(kind, ("float32", False))
    assert (mode.weights_dtype, mode.autocast) == expected


@pytest.mark.parametrize("mode", MODES.values(), ids=lambda m: m.name)
def test_loss_is_scaled_where_gradients_can_underflow(mode):
    """Only mixed float16 trains under a loss scaler."""
    assert mode.scaler == (mode.name == "fp16-mixed")


@pytest.mark.parametrize("mode", MODES.values(), ids=lambda m: m.name)
def test_tolerance_has_a_reason(mode):
    """Every tolerance is positive, below one in ten, and carries its reason."""
    assert 0 < mode.logits_rtol < 0.1
    assert mode.reason
