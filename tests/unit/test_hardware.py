"""Hardware and precision: what a device lacks, and what the modes promise."""

from __future__ import annotations

import pytest
from hypothesis import given

from pytest_sftguard.hardware import HardwareProfile
from pytest_sftguard.precision import MODES, mode_named
from tests.strategies import devices, precisions
from tests.support import canned


@pytest.mark.parametrize("mode", MODES)
def test_hopper_lacks_nothing(mode):
    """An H100 has every mode in hardware."""
    assert canned.H100.lacks(MODES[mode]) is None


@pytest.mark.parametrize("mode", [m for m in MODES if m != "tf32"])
def test_cpu_lacks_only_tf32(mode):
    """A CPU can train in every mode but tf32."""
    assert canned.CPU.lacks(MODES[mode]) is None


def test_minor_version_counts_as_a_number():
    """Compute capability 10.0 is above 8.0, unlike the text."""
    assert HardwareProfile(device_type="cuda", name="B200", capability="10.0").lacks(MODES["bf16-mixed"]) is None


@given(device=devices(), precision=precisions())
def test_reason_names_the_mode_or_its_type(device, precision):
    """The reason names the mode, or the type in which it computes."""
    mode = MODES[precision]
    reason = device.lacks(mode)
    assert reason is None or mode.name in reason or mode.compute_dtype in reason


@given(device=devices())
def test_float32_is_everywhere(device):
    """Every device can train in float32."""
    assert device.lacks(MODES["fp32"]) is None


@pytest.mark.parametrize("name", MODES)
def test_mode_is_found_by_its_name(name):
    """The table is keyed by the names of its rows."""
    assert mode_named(name).name == name


@pytest.mark.parametrize("name", ["fp8", "", "FP32", None, ["fp32"]], ids=repr)
def test_unknown_mode_lists_the_modes(name):
    """The error quotes the name and lists the valid ones."""
    with pytest.raises(ValueError, match=f"unknown precision .*: choose from {', '.join(MODES)}"):
        mode_named(name)


@pytest.mark.parametrize("mode", MODES.values(), ids=lambda m: m.name)
def test_name_says_weights_and_compute(mode):
    """A `-true` mode computes in the type of its weights, a `-mixed` mode has float32 weights and autocast.

    A quantised base keeps the rest of its weights in the type that it computes in.
    """
    suffix = mode.name.rpartition("-")[2]
    expected = {"true": (mode.compute_dtype, False), "mixed": ("float32", True), "bf16": ("bfloat16", True)}.get(
        suffix, ("float32", False)
    )
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
