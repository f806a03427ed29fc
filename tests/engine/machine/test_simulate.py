"""simulated_hardware: torch, transformers and accelerate answer for an absent device, until the end."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate.state
import accelerate.utils
import pytest
import torch
import transformers.integrations.sdpa_attention
from hypothesis import given, settings
from transformers.utils import import_utils

from pytest_sftguard.engine.machine.profiles import choose_device, device_profile
from pytest_sftguard.engine.machine.simulate import SimulatedDeviceError, SimulatedQueryError, simulated_hardware
from pytest_sftguard.hardware import GIB, KNOWN_DEVICES, FailedQuery, HardwareProfile, device_named
from pytest_sftguard.strategies import hardware_profiles

NAMES = (
    "torch torch.cuda torch.cuda.memory torch.xpu torch.xpu.memory torch.mps torch.accelerator torch.accelerator.memory"
    " torch.version torch.backends.cuda torch.backends.mps torch._C torch._utils transformers.utils.import_utils"
    " accelerate.utils.imports accelerate.state transformers.integrations.sdpa_attention"
)
WATCHED = [importlib.import_module(name) for name in NAMES.split()]
"""Modules whose attributes are all compared by identity, whether or not the simulation replaces them."""


def snapshot() -> dict[tuple[str, str], object]:
    return {(module.__name__, name): value for module in WATCHED for name, value in vars(module).items()}


def cuda(**fields: Any) -> HardwareProfile:
    plain = {"device_type": "cuda", "name": "GPU", "total_memory_bytes": 16 * GIB, "capability": "8.0"}
    return HardwareProfile(**plain | fields)


@contextlib.contextmanager
def nothing_left() -> Iterator[None]:
    """Every attribute of WATCHED is the very same object afterwards, and none is new or absent."""
    importlib.import_module("torch._subclasses.fake_tensor")
    before, modes = snapshot(), torch.overrides._get_current_function_mode_stack()
    yield
    after = snapshot()
    assert before.keys() == after.keys()
    assert [name for name, value in before.items() if after[name] is not value] == []
    assert torch.overrides._get_current_function_mode_stack() == modes


def answers() -> dict[str, Any]:
    """Answers to the queries of a training script, on any machine."""
    return {
        "cuda": (torch.cuda.is_available(), torch.cuda.device_count()),
        "xpu": (torch.xpu.is_available(), torch.xpu.device_count()),
        "mps": (torch.backends.mps.is_available(), torch.backends.mps.is_built(), torch.mps.device_count()),
        "accelerator": (
            torch.accelerator.is_available(),
            torch.accelerator.current_accelerator(),
            torch.accelerator.device_count(),
            torch.get_device_module(),
        ),
        "versions": (torch.version.cuda, torch.version.hip, getattr(torch.version, "xpu", None)),
        "bf16": (torch.cuda.is_bf16_supported(), torch.cuda.is_bf16_supported(including_emulation=False)),
        "transformers": (
            import_utils.is_torch_cuda_available(),
            import_utils.is_torch_xpu_available(),
            import_utils.is_torch_mps_available(),
            import_utils.is_torch_bf16_gpu_available(),
            import_utils.is_torch_tf32_available(),
            import_utils.is_cuda_platform(),
            import_utils.is_rocm_platform(),
        ),
        "accelerate": (
            accelerate.utils.is_cuda_available(),
            accelerate.utils.is_xpu_available(),
            accelerate.utils.is_mps_available(),
            accelerate.utils.is_bf16_available(),
        ),
        # constants of a module that queried the device when it was imported
        "imported": {
            name: value
            for name, value in vars(transformers.integrations.sdpa_attention).items()
            if name.endswith("_available") and isinstance(value, bool)
        },
        "state": accelerate.state.PartialState().device.type,
    }


REAL = answers()


@pytest.mark.parametrize("name", KNOWN_DEVICES)
def test_one_device_type_is_there(name: str) -> None:
    """torch, transformers and accelerate agree on the device type and the number of devices."""
    with simulated_hardware(name) as profile:
        device_type, found = profile.device_type, answers()
    on_cuda = device_type in ("cuda", "rocm")
    assert found["cuda"] == (on_cuda, profile.count if on_cuda else 0)
    assert found["xpu"] == (device_type == "xpu", int(device_type == "xpu"))
    assert found["mps"] == (device_type == "mps", device_type == "mps", int(device_type == "mps"))
    type_ = "cuda" if on_cuda else device_type
    assert found["accelerator"][:3] == (
        (True, torch.device(type_), profile.count) if device_type != "cpu" else (False, None, 0)
    )
    assert [bool(version) for version in found["versions"]] == [device_type == k for k in ("cuda", "rocm", "xpu")]
    assert found["transformers"][:3] == (on_cuda, device_type == "xpu", device_type == "mps")
    assert found["transformers"][5:] == (device_type == "cuda", device_type == "rocm")
    assert found["accelerate"][:3] == (on_cuda, device_type == "xpu", device_type == "mps")
    # the names differ between versions
    assert found["imported"]
    for name, value in found["imported"].items():
        assert value == (name == f"_is_torch_{device_type}_available"), name
    assert found["state"] == type_
    assert answers() == REAL


@pytest.mark.parametrize("name", [n for n, d in KNOWN_DEVICES.items() if d.profile.device_type in ("cuda", "rocm")])
def test_torch_cuda_answers(name: str) -> None:
    """Name, capability, memory, and bfloat16 with and without emulation."""
    with simulated_hardware(name) as profile:
        properties = torch.cuda.get_device_properties("cuda:0")
        assert properties.name == torch.cuda.get_device_name() == profile.name
        assert torch.cuda.get_device_capability() == (properties.major, properties.minor)
        assert torch.cuda.mem_get_info() == (profile.total_memory_bytes,) * 2
        assert torch.accelerator.get_memory_info() == (profile.total_memory_bytes,) * 2
        assert torch.cuda.current_device() == 0
        assert torch.cuda.is_bf16_supported()
        if profile.device_type == "cuda":
            assert torch.cuda.get_device_capability(0) == profile.compute_capability
            assert torch.cuda.is_bf16_supported(including_emulation=False) == ("bfloat16" in profile.native)
            assert torch.cuda.is_tf32_supported() == ("tf32" in profile.native)
        else:
            # torch's own quirk: it never queries an AMD device
            assert torch.cuda.is_bf16_supported(including_emulation=False)
            assert properties.gcnArchName == profile.architecture


def test_torch_xpu_and_mps_answer() -> None:
    """Intel's and Apple's own queries are answered."""
    with simulated_hardware("Arc A770") as profile:
        assert torch.xpu.get_device_name(0) == profile.name
        assert torch.xpu.is_bf16_supported(including_emulation=False)
        assert torch.xpu.mem_get_info()[1] == profile.total_memory_bytes
        assert torch.xpu.get_device_capability()["total_memory"] == profile.total_memory_bytes
    with simulated_hardware(HardwareProfile(device_type="xpu", name="x", total_memory_bytes=1, emulates=("bfloat16",))):
        assert torch.xpu.is_bf16_supported()
        assert not torch.xpu.is_bf16_supported(including_emulation=False)
    with simulated_hardware("M1") as profile:
        assert torch.mps.recommended_max_memory() == profile.total_memory_bytes
        assert torch.backends.mps.is_macos_or_newer(14, 0)


def test_a_tenant_shows_in_the_free_memory() -> None:
    """The total memory stays the same."""
    with simulated_hardware(dataclasses.replace(device_named("T4"), free_memory_bytes=6 * GIB)):
        assert torch.cuda.mem_get_info() == (6 * GIB, 16 * GIB)


def test_devices_are_counted_and_chosen() -> None:
    """set_device works, and an invalid index is refused as by torch."""
    with simulated_hardware("A100 40GB x8"):
        torch.cuda.set_device(3)
        assert torch.cuda.current_device() == torch.accelerator.current_device_index() == 3
        with torch.cuda.device(5):
            assert torch.cuda.current_device() == 5
        assert torch.cuda.current_device() == 3
        with pytest.raises(AssertionError, match="Invalid device id"):
            torch.cuda.get_device_properties(8)


def test_a_property_that_no_profile_knows_is_a_clear_error() -> None:
    """The simulation invents no value."""
    with simulated_hardware("T4"), pytest.raises(AttributeError, match=r"simulated_hardware.*multi_processor_count"):
        _ = torch.cuda.get_device_properties(0).multi_processor_count


COMPUTING: dict[str, Callable[[], Any]] = {
    "zeros": lambda: torch.zeros(2, device="cuda"),
    "zeros on an index": lambda: torch.zeros(2, device=0),
    "tensor": lambda: torch.tensor([1.0], device=torch.device("cuda", 0)),
    "to": lambda: torch.zeros(2).to("cuda"),
    "to an index": lambda: torch.zeros(2).to(0),
    "to keyword": lambda: torch.zeros(2).to(device="cuda:0"),
    "cuda": lambda: torch.zeros(2).cuda(),
    "module to": lambda: torch.nn.Linear(2, 2).to("cuda"),
    "module cuda": lambda: torch.nn.Linear(2, 2).cuda(),
    "mps": lambda: torch.zeros(2, device="mps"),
    "to mps": lambda: torch.zeros(2).to("mps"),
    "xpu": lambda: torch.zeros(2).xpu(),
    "pin": lambda: torch.zeros(2).pin_memory(),
    "pinned": lambda: torch.zeros(2, pin_memory=True),
    "storage": lambda: torch.UntypedStorage(4, device="cuda"),
    "synchronize": lambda: torch.cuda.synchronize(),
    "stream": lambda: torch.cuda.current_stream(),
}


@pytest.mark.parametrize("name", ["T4", "MI300X", "Arc A770", "M1", "CPU"])
@pytest.mark.parametrize("compute", COMPUTING.values(), ids=COMPUTING)
def test_computing_is_refused(name: str, compute: Callable[[], Any]) -> None:
    """The error names the simulation and its device, whichever accelerator was used."""
    with simulated_hardware(name) as profile, pytest.raises(SimulatedDeviceError) as caught:
        compute()
    assert "simulated_hardware" in str(caught.value)
    assert profile.name in str(caught.value)


def test_the_cpu_still_computes() -> None:
    """So do the meta device and fake tensors, which have no memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with simulated_hardware("T4"):
        assert torch.ones(2, device="cpu").to("cpu").sum().item() == 2
        assert torch.zeros(2, device="meta").device.type == "meta"
        with FakeTensorMode():
            fake = torch.zeros(2, 2, device="cuda")
            assert fake.device.type == "cuda"


@pytest.mark.parametrize("name", KNOWN_DEVICES)
def test_it_leaves_nothing_behind(name: str) -> None:
    """Every attribute of torch's modules is the very same object after it."""
    with nothing_left(), simulated_hardware(name):
        answers()


class BoomError(Exception):
    pass


def test_it_leaves_nothing_behind_after_an_exception() -> None:
    """Also if the code under test, or torch, raises."""
    with nothing_left(), pytest.raises(BoomError), simulated_hardware("T4"):
        raise BoomError
    with nothing_left(), pytest.raises(SimulatedDeviceError), simulated_hardware("T4"):
        torch.zeros(1, device="cuda")
    assert answers() == REAL


@given(hardware_profiles())
@settings(max_examples=25)
def test_it_leaves_nothing_behind_whatever_the_profile(profile: HardwareProfile) -> None:
    """Also with adversarial profiles, whose queries may raise."""
    with nothing_left(), simulated_hardware(profile), contextlib.suppress(SimulatedQueryError):
        answers()


def test_a_profile_that_leaves_something_open_is_refused_and_leaves_nothing() -> None:
    """Every driver reports the memory and the capability."""
    for profile, missing in (
        (HardwareProfile(device_type="cuda", name="x", total_memory_bytes=1), "capability"),
        (HardwareProfile(device_type="mps", name="x"), "total_memory_bytes"),
    ):
        with nothing_left(), pytest.raises(ValueError, match=missing), simulated_hardware(profile):
            pass
    with nothing_left(), pytest.raises(ValueError, match="unknown device 'T5'"), simulated_hardware("T5"):
        pass


def test_simulations_nest() -> None:
    """The inner one answers, and after it the outer one again."""
    with nothing_left(), simulated_hardware("T4"):
        with simulated_hardware("M1"):
            assert not torch.cuda.is_available()
            assert torch.backends.mps.is_available()
        assert torch.cuda.get_device_name() == "Tesla T4"
        assert import_utils.is_torch_cuda_available()
        assert accelerate.state.PartialState().device.type == "cuda"
    assert answers() == REAL


def test_names_that_were_imported_are_answered_for_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`from torch.cuda import is_available` works before the simulation and within it."""
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("asked_before", "asked_within"):
        (tmp_path / f"{name}.py").write_text("from torch.cuda import is_available, mem_get_info\n", encoding="utf-8")
    before = importlib.import_module("asked_before")
    originals = before.is_available, before.mem_get_info
    with simulated_hardware("T4"):
        within = importlib.import_module("asked_within")
        assert before.is_available()
        with simulated_hardware("M1"):
            assert not before.is_available()
            assert not within.is_available()
        assert before.mem_get_info() == within.mem_get_info() == (16 * GIB, 16 * GIB)
    assert (before.is_available, before.mem_get_info) == originals
    assert (within.is_available, within.mem_get_info) == originals
    for name in ("asked_before", "asked_within"):
        del sys.modules[name]


def test_training_arguments_use_the_simulated_device() -> None:
    """Transformers' own choice of device and its check of bf16 see the simulated device."""
    from transformers import TrainingArguments

    with nothing_left(), simulated_hardware("A100 80GB"):
        arguments = TrainingArguments(output_dir="unused", bf16=True, report_to="none")
        assert arguments.device == torch.device("cuda", 0)
        assert arguments.n_gpu == 1
    assert TrainingArguments(output_dir="unused", report_to="none").device.type == REAL["state"]


@pytest.mark.parametrize(
    ("query", "ask"),
    [
        ("is_available", lambda: torch.cuda.is_available()),
        ("is_available", lambda: torch.accelerator.is_available()),
        ("device_count", lambda: torch.cuda.device_count()),
        ("get_device_properties", lambda: torch.cuda.get_device_properties(0)),
        ("get_device_properties", lambda: torch.cuda.get_device_name()),
        ("get_device_capability", lambda: torch.cuda.get_device_capability()),
        ("is_bf16_supported", lambda: torch.cuda.is_bf16_supported()),
        ("mem_get_info", lambda: torch.cuda.mem_get_info()),
        ("mem_get_info", lambda: torch.cuda.memory.mem_get_info()),
        ("mem_get_info", lambda: torch.accelerator.get_memory_info()),
    ],
)
def test_a_query_can_fail(query: str, ask: Callable[[], Any]) -> None:
    """The profile says which query fails, and with which message, as with a broken driver."""
    profile = cuda(unanswered=(FailedQuery(query, "driver gone"),))
    with nothing_left(), simulated_hardware(profile), pytest.raises(SimulatedQueryError, match=r"^driver gone$"):
        ask()


@pytest.mark.parametrize("name", [n for n, d in KNOWN_DEVICES.items() if d.profile.device_type != "cpu"])
def test_a_simulated_device_has_its_own_profile(name: str) -> None:
    """Profiles and simulations use the same queries."""
    with simulated_hardware(name) as profile:
        seen = device_profile("cuda" if profile.device_type == "rocm" else profile.device_type)
    free = profile.total_memory_bytes
    count = 1 if profile.device_type == "mps" else profile.count
    host = device_profile("cpu").total_memory_bytes
    assert seen == dataclasses.replace(profile, free_memory_bytes=free, host_memory_bytes=host, count=count)


@given(hardware_profiles(("cuda", "rocm", "xpu", "mps")))
@settings(max_examples=50)
def test_a_profile_survives_any_driver(profile: HardwareProfile) -> None:
    """The fields of failed queries are None, and the profile lists the failures."""
    with simulated_hardware(profile):
        seen = device_profile("cuda" if profile.device_type == "rocm" else profile.device_type)
    asked = ("device_count", "get_device_properties", "mem_get_info")
    expected = {f.query: f.message for f in profile.unanswered if f.query in asked}
    if profile.device_type == "mps":
        expected = {query: words for query, words in expected.items() if query == "mem_get_info"}
    assert {f.query for f in seen.unanswered} == set(expected)
    for failure in seen.unanswered:
        assert failure.message == (expected[failure.query] or "SimulatedQueryError")
    if "mem_get_info" in expected:
        assert seen.free_memory_bytes is None
    if "get_device_properties" in expected:
        assert seen.total_memory_bytes is None
        assert seen.capability is None


def test_this_machine_has_a_profile() -> None:
    """It has the total and free memory of the host, and the threads."""
    profile = device_profile("cpu")
    assert profile.host_memory_bytes == profile.total_memory_bytes
    assert profile.threads == torch.get_num_threads()
    if sys.platform == "linux":
        assert 0 < (profile.free_memory_bytes or 0) <= (profile.total_memory_bytes or 0)


def test_a_driver_that_cannot_tell_is_no_reason_for_the_cpu() -> None:
    """`auto` does not silently become the CPU if the query for CUDA raises."""
    with simulated_hardware(cuda(unanswered=(FailedQuery("is_available", "driver gone"),))):
        device_type, unavailable = choose_device("auto")
    assert device_type == "cuda"
    assert unavailable is not None
    assert "driver gone" in unavailable
    with simulated_hardware("T4"):
        assert choose_device("auto") == ("cuda", None)
        assert choose_device("xpu")[1] is not None
    with simulated_hardware("CPU"):
        assert choose_device("auto") == ("cpu", None)


def test_the_fixture_lasts_as_long_as_the_test(pytester: pytest.Pytester) -> None:
    """A second call replaces the first, and the next test sees the real machine."""
    pytester.makepyfile(
        f"""
        import torch

        def test_t4(simulated_hardware):
            assert simulated_hardware("T4").capability == "7.5"
            assert torch.cuda.get_device_capability() == (7, 5)
            simulated_hardware("M1")
            assert not torch.cuda.is_available() and torch.backends.mps.is_available()

        def test_failing(simulated_hardware):
            simulated_hardware("T4")
            assert False

        def test_after():
            assert torch.cuda.is_available() is {torch.cuda.is_available()}
            assert torch.backends.mps.is_available() is {torch.backends.mps.is_available()}
        """
    )
    for arguments in ([], ["-n2"]):
        result = pytester.runpytest_subprocess("-p", "no:cacheprovider", *arguments)
        result.assert_outcomes(passed=2, failed=1)
