"""The selectors: batch and precision by hardware, by environment and by flag, each with its reason."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from homework.selection import (
    GB,
    Hardware,
    Selection,
    SelectionError,
    choose_batch,
    choose_precision,
    largest_micro_batch,
)
from homework.sft import determine_batch_hparams, determine_precision_flags

VARIABLES = ("SFT_MICRO_BATCH_SIZE", "SFT_GRAD_ACCUM_STEPS", "SFT_PRECISION")


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def pretend_gpu(
    monkeypatch: pytest.MonkeyPatch,
    *,
    memory: Any = 16 * GB,
    capability: Any = (8, 0),
    hip: str | None = None,
    rocm_bf16: bool = True,
) -> None:
    """Make torch report one GPU; an exception in place of a value is raised by the query."""
    import torch

    def tell(value: Any) -> Any:
        if isinstance(value, Exception):
            raise value
        return value

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(name="pretended", total_memory=tell(memory))
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=0: tell(capability))
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or rocm_bf16
    )
    monkeypatch.setattr(torch.version, "hip", hip)


def pretend_cpu(monkeypatch: pytest.MonkeyPatch, *, mps: bool = False) -> None:
    """Make torch report no GPU, or Apple's."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(
    ("memory", "expected"),
    [
        (1, (2, 16)),
        (10 * GB - 1, (2, 16)),
        (10 * GB, (4, 8)),
        (20 * GB - 1, (4, 8)),
        (20 * GB, (8, 4)),
        (40 * GB - 1, (8, 4)),
        (40 * GB, (16, 2)),
        (141 * GB, (16, 2)),
    ],
)
def test_micro_batch_follows_gpu_memory(
    monkeypatch: pytest.MonkeyPatch, memory: int, expected: tuple[int, int]
) -> None:
    """2 below 10 GB, 4 below 20, 8 below 40, 16 from there; the effective batch stays 32."""
    pretend_gpu(monkeypatch, memory=memory)
    assert determine_batch_hparams() == expected


@pytest.mark.parametrize("mps", [False, True])
def test_micro_batch_is_eight_without_cuda(monkeypatch: pytest.MonkeyPatch, mps: bool) -> None:
    """CPU and MPS get 8x4 and fp32."""
    pretend_cpu(monkeypatch, mps=mps)
    assert determine_batch_hparams() == (8, 4)
    assert determine_precision_flags() == (False, False)


@pytest.mark.parametrize("memory", [0, RuntimeError("driver gone")])
def test_unreadable_memory_gives_the_safe_choice_and_says_so(monkeypatch: pytest.MonkeyPatch, memory: Any) -> None:
    """Zero memory, or a query that raises, is never read as a large GPU."""
    from homework.selection import query_hardware

    pretend_gpu(monkeypatch, memory=memory)
    assert determine_batch_hparams() == (2, 16)
    assert "safe choice" in largest_micro_batch(query_hardware()).reason


@pytest.mark.parametrize(
    ("capability", "flags"),
    [
        ((7, 0), (True, False)),
        ((7, 5), (True, False)),
        ((8, 0), (False, True)),
        ((9, 0), (False, True)),
        ((12, 0), (False, True)),
        (RuntimeError("driver gone"), (False, False)),
    ],
)
def test_precision_follows_what_the_gpu_has_natively(
    monkeypatch: pytest.MonkeyPatch, capability: Any, flags: tuple[bool, bool]
) -> None:
    """A T4 (7.5) says that it supports bf16 and only emulates it, so it gets fp16; a failed query gives fp32."""
    pretend_gpu(monkeypatch, capability=capability)
    assert determine_precision_flags() == flags


@pytest.mark.parametrize(("native", "flags"), [(True, (False, True)), (False, (True, False))])
def test_rocm_is_asked_without_emulation(
    monkeypatch: pytest.MonkeyPatch, native: bool, flags: tuple[bool, bool]
) -> None:
    """On ROCm the capability is not CUDA's, so the query that leaves emulation out decides."""
    pretend_gpu(monkeypatch, capability=(9, 0), hip="6.4", rocm_bf16=native)
    assert determine_precision_flags() == flags


def test_a_broken_driver_is_a_cpu_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """If even `is_available` raises, the run goes on as on a CPU."""
    import torch

    from homework.selection import query_hardware

    def broken() -> bool:
        raise RuntimeError("driver gone")

    monkeypatch.setattr(torch.cuda, "is_available", broken)
    assert query_hardware().device_type == "cpu"
    assert "driver gone" in query_hardware().trouble
    assert determine_batch_hparams() == (8, 4)


def test_the_least_of_several_gpus_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch must fit, and a precision be native, on every GPU that the Trainer may use."""
    import torch

    pretend_gpu(monkeypatch)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    sizes = [80 * GB, 16 * GB]
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda i: SimpleNamespace(name="pretended", total_memory=sizes[i])
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: [(9, 0), (7, 5)][i])
    assert determine_batch_hparams() == (4, 8)
    assert determine_precision_flags() == (True, False)


def test_arguments_go_before_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Argument, then variable, then automatic, for each of the two numbers on its own."""
    pretend_cpu(monkeypatch)
    monkeypatch.setenv("SFT_MICRO_BATCH_SIZE", "4")
    assert determine_batch_hparams() == (4, 8)
    assert determine_batch_hparams(per_device_override=2) == (2, 16)
    monkeypatch.setenv("SFT_GRAD_ACCUM_STEPS", "3")
    assert determine_batch_hparams() == (4, 3)
    assert determine_batch_hparams(grad_accum_override=5) == (4, 5)


@pytest.mark.parametrize(
    ("name", "flags"),
    [("fp32", (False, False)), ("bf16", (False, True)), ("fp16", (True, False)), ("BF16", (False, True))],
)
def test_precision_variable_overrides(monkeypatch: pytest.MonkeyPatch, name: str, flags: tuple[bool, bool]) -> None:
    """SFT_PRECISION goes before what the GPU has."""
    pretend_gpu(monkeypatch, capability=(7, 5))
    monkeypatch.setenv("SFT_PRECISION", name)
    assert determine_precision_flags() == flags


@pytest.mark.parametrize("variable", ["SFT_MICRO_BATCH_SIZE", "SFT_GRAD_ACCUM_STEPS"])
@pytest.mark.parametrize("text", ["abc", "", "0", "-2", "1.5", "\uff18", "1e3", "nan"])
def test_a_variable_that_is_no_count_is_named(monkeypatch: pytest.MonkeyPatch, variable: str, text: str) -> None:
    """The error quotes the value and names the variable."""
    pretend_cpu(monkeypatch)
    monkeypatch.setenv(variable, text)
    with pytest.raises(ValueError, match=variable):
        determine_batch_hparams()


def test_an_unknown_precision_is_named_with_the_valid_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error lists fp32, bf16 and fp16."""
    monkeypatch.setenv("SFT_PRECISION", "fp8")
    with pytest.raises(ValueError, match="SFT_PRECISION must be one of fp32, bf16, fp16, not 'fp8'"):
        determine_precision_flags()


@pytest.mark.parametrize("target", [0, -1, True, 2.5])
def test_a_target_that_is_no_count_is_refused(target: Any) -> None:
    """The target batch is a whole number of 1 or more."""
    with pytest.raises(SelectionError, match="target_batch_size"):
        determine_batch_hparams(target)


HARDWARE = st.builds(
    Hardware, device_type=st.sampled_from(["cuda", "mps", "cpu"]), memory_bytes=st.none() | st.integers(0, 200 * GB)
)


@given(target=st.integers(1, 4096), hardware=HARDWARE)
def test_effective_batch_is_as_near_the_target_as_the_hardware_allows(target: int, hardware: Hardware) -> None:
    """Exact where the micro-batch divides the target, never a full micro-batch off, never a micro-batch above it."""
    micro_batch, accumulation = choose_batch(target, hardware, None, None)
    effective = micro_batch.value * accumulation.value
    assert 1 <= micro_batch.value <= min(target, largest_micro_batch(hardware).value)
    assert 2 * abs(effective - target) <= micro_batch.value
    assert effective == target or target % micro_batch.value
    assert micro_batch.reason
    assert accumulation.reason


@given(target=st.integers(1, 512), steps=st.integers(1, 64), hardware=HARDWARE)
def test_asked_accumulation_is_kept(target: int, steps: int, hardware: Hardware) -> None:
    """The micro-batch shrinks, within the hardware, to bring the product near the target."""
    micro_batch, accumulation = choose_batch(target, hardware, None, Selection(steps, "asked"))
    assert accumulation.value == steps
    assert 1 <= micro_batch.value <= largest_micro_batch(hardware).value
    larger = (micro_batch.value + 1) * steps
    if micro_batch.value < min(target, largest_micro_batch(hardware).value):
        assert abs(micro_batch.value * steps - target) <= abs(larger - target)


@given(hardware=HARDWARE, native=st.sampled_from([None, True, False]))
def test_every_precision_has_a_reason(hardware: Hardware, native: bool | None) -> None:
    """No choice is silent."""
    choice = choose_precision(Hardware(device_type=hardware.device_type, native_bf16=native, bf16_reason="so"), None)
    assert choice.value in ("fp32", "bf16", "fp16")
    assert choice.reason
