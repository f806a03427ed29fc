"""The selectors through the real query path: on every known device, on plausible mutations of it, and on the worst.

`HYPOTHESIS_PROFILE=thorough` runs 1,000 examples of each property; the default is `quick`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from unittest import mock

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from homework.selection import (
    Hardware,
    Selection,
    SelectionError,
    asked_precision,
    choose_batch,
    choose_precision,
    largest_micro_batch,
    query_hardware,
)
from homework.sft import determine_batch_hparams, determine_precision_flags
from pytest_sftguard.engine.machine.simulate import simulated_hardware
from pytest_sftguard.hardware import GIB, KNOWN_DEVICES, FailedQuery, HardwareProfile, device_named
from pytest_sftguard.strategies import hardware_profiles

MICRO_BATCH, ACCUMULATION, PRECISION = "SFT_MICRO_BATCH_SIZE", "SFT_GRAD_ACCUM_STEPS", "SFT_PRECISION"
VARIABLES = (MICRO_BATCH, ACCUMULATION, PRECISION)
THRESHOLDS = (10 * GIB, 20 * GIB, 40 * GIB)
PROFILES = hardware_profiles(thresholds=THRESHOLDS)
GPUS = hardware_profiles(("cuda", "rocm"), thresholds=THRESHOLDS)
TARGETS = st.integers(1, 512) | st.sampled_from((32, 1, 2, 7, 4096))
COUNTS = st.integers(1, 64)
NO_COUNTS = st.sampled_from(("", " ", "0", "-2", "1.5", "eight", "nan", "1e3", "\N{FULLWIDTH DIGIT EIGHT}", "1_0"))
ASKED = ("is_available", "device_count", "get_device_properties")
"""Queries of which the selectors use the answer on every GPU; each vendor has one more."""
ASKED_OF = {"cuda": (*ASKED, "get_device_capability"), "rocm": (*ASKED, "is_bf16_supported")}


@pytest.fixture(autouse=True)
def _clean_environment() -> Iterator[None]:
    """The user's own variables are set aside; each example sets and resets its own with `environment`."""
    with mock.patch.dict(os.environ):
        for name in VARIABLES:
            os.environ.pop(name, None)
        yield


def environment(**variables: str | int | None) -> mock._patch_dict:
    return mock.patch.dict(os.environ, {k: str(v) for k, v in variables.items() if v is not None})


def choices(target: int = 32) -> tuple[Selection[int], Selection[int], Selection[str]]:
    """What the command line's selection gives, with its reasons."""
    hardware = query_hardware()
    return *choose_batch(target, hardware, None, None), choose_precision(hardware, None)


def unreadable(profile: HardwareProfile) -> bool:
    """Whether a query that the selectors need is one that raises."""
    if profile.device_type in ("mps", "xpu"):
        return profile.failure_of("is_available") is not None
    return any(profile.failure_of(query) for query in ASKED_OF.get(profile.device_type, ()))


@given(PROFILES)
def test_emulated_bfloat16_is_never_picked(profile: HardwareProfile) -> None:
    """Though torch calls it supported on a T4, and on every AMD device."""
    with simulated_hardware(profile):
        _, use_bf16 = determine_precision_flags()
    assert not use_bf16 or "bfloat16" in profile.native


@given(PROFILES)
def test_float16_is_never_picked_where_the_device_lacks_it(profile: HardwareProfile) -> None:
    """A Maxwell or Kepler card has no float16 arithmetic."""
    with simulated_hardware(profile):
        use_fp16, _ = determine_precision_flags()
    assert not use_fp16 or "float16" in profile.native


@given(PROFILES)
def test_never_float16_and_bfloat16_together(profile: HardwareProfile) -> None:
    """The Trainer refuses both."""
    with simulated_hardware(profile):
        assert determine_precision_flags() in ((False, False), (True, False), (False, True))


@given(hardware_profiles(("cpu", "mps", "xpu")))
def test_without_cuda_the_precision_is_float32(profile: HardwareProfile) -> None:
    """And the micro-batch 8."""
    with simulated_hardware(profile):
        assert determine_precision_flags() == (False, False)
        assert determine_batch_hparams() == (8, 4)


@given(GPUS)
def test_native_bfloat16_is_used(profile: HardwareProfile) -> None:
    """Otherwise float32 alone would satisfy every property; float16 where that is all there is."""
    assume(not unreadable(profile))
    with simulated_hardware(profile):
        flags = determine_precision_flags()
    assert flags == ("float16" in profile.native and "bfloat16" not in profile.native, "bfloat16" in profile.native)


@given(PROFILES, TARGETS)
def test_the_micro_batch_is_from_1_to_the_target(profile: HardwareProfile, target: int) -> None:
    """And at most 16."""
    with simulated_hardware(profile):
        micro_batch, accumulation = determine_batch_hparams(target)
    assert 1 <= micro_batch <= min(target, 16)
    assert accumulation >= 1


@given(GPUS, st.integers(0, 200 * GIB) | st.sampled_from(THRESHOLDS), st.integers(0, 50 * GIB), TARGETS)
def test_the_micro_batch_never_shrinks_as_memory_grows(
    profile: HardwareProfile, memory: int, more: int, target: int
) -> None:
    """The same device, with more memory."""
    chosen = []
    for total in (memory, memory + more):
        with simulated_hardware(dataclasses.replace(profile, total_memory_bytes=total, free_memory_bytes=None)):
            chosen.append(determine_batch_hparams(target)[0])
    assert chosen[0] <= chosen[1]


@pytest.mark.parametrize(
    ("memory", "micro_batch"),
    [
        (0, 2),
        (1, 2),
        (10 * GIB - 1, 2),
        (10 * GIB, 4),
        (10 * GIB + 1, 4),
        (20 * GIB - 1, 4),
        (20 * GIB, 8),
        (20 * GIB + 1, 8),
        (40 * GIB - 1, 8),
        (40 * GIB, 16),
        (40 * GIB + 1, 16),
        (2**63 - 1, 16),
    ],
)
@given(profile=GPUS)
def test_the_thresholds_are_exactly_at_their_bytes(memory: int, micro_batch: int, profile: HardwareProfile) -> None:
    """On every GPU, whatever a tenant holds; a device of which the memory is unknown gets the least."""
    with simulated_hardware(dataclasses.replace(profile, total_memory_bytes=memory)):
        expected = 2 if _memory_is_unknown(profile) else micro_batch
        # nothing says then that there is a GPU
        if profile.failure_of("is_available"):
            expected = 8
        assert determine_batch_hparams() == (expected, 32 // expected)


def _memory_is_unknown(profile: HardwareProfile) -> bool:
    return any(profile.failure_of(query) for query in ("device_count", "get_device_properties"))


@given(PROFILES, TARGETS, st.none() | COUNTS)
def test_the_effective_batch_is_kept_where_it_can_be(
    profile: HardwareProfile, target: int, asked_micro_batch: int | None
) -> None:
    """Exactly where the micro-batch divides it, and never off by a full micro-batch."""
    with simulated_hardware(profile):
        micro_batch, accumulation = determine_batch_hparams(target, per_device_override=asked_micro_batch)
    effective = micro_batch * accumulation
    if target % micro_batch == 0:
        assert effective == target
    if micro_batch <= target:
        assert abs(effective - target) < micro_batch
    else:
        assert accumulation == 1


@given(PROFILES, TARGETS, COUNTS)
def test_a_given_accumulation_is_kept(profile: HardwareProfile, target: int, accumulation: int) -> None:
    """The micro-batch shrinks towards the target, and never grows above what the device gets otherwise."""
    with simulated_hardware(profile):
        largest, _ = determine_batch_hparams(4096)
        micro_batch, kept = determine_batch_hparams(target, grad_accum_override=accumulation)
    assert kept == accumulation
    assert 1 <= micro_batch <= min(largest, target)
    assert micro_batch == 1 or micro_batch * accumulation - target < accumulation


OVERRIDES = st.tuples(st.none() | COUNTS, st.none() | COUNTS)


@given(PROFILES, OVERRIDES, OVERRIDES)
def test_batch_overrides_win_in_order(
    profile: HardwareProfile, micro: tuple[int | None, int | None], steps: tuple[int | None, int | None]
) -> None:
    """The argument, then the variable, then the device; each of the two numbers on its own."""
    variables = environment(**{MICRO_BATCH: micro[1], ACCUMULATION: steps[1]})
    with simulated_hardware(profile), variables:
        micro_batch, accumulation = determine_batch_hparams(per_device_override=micro[0], grad_accum_override=steps[0])
    for got, asked in ((micro_batch, micro), (accumulation, steps)):
        wanted = next((number for number in asked if number is not None), None)
        assert wanted is None or got == wanted


def test_counts_of_up_to_nine_digits_are_read() -> None:
    """A longer one is a slip of the hand, and int() of a very long one takes its time."""
    assert determine_batch_hparams(32, per_device_override="+99999999") == (99_999_999, 1)  # type: ignore[arg-type]
    assert determine_batch_hparams(32, per_device_override="999999999") == (999_999_999, 1)  # type: ignore[arg-type]
    with pytest.raises(SelectionError, match="not '1000000000'"):
        determine_batch_hparams(32, per_device_override="1000000000")  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [Selection(1, "so"), Hardware()])
def test_choices_do_not_change(value: object) -> None:
    """Neither what was chosen, nor what it was chosen by."""
    with pytest.raises(AttributeError):
        setattr(value, next(iter(vars(value))), "other")


def test_a_gpu_has_float16_unless_it_is_said() -> None:
    """Every device that this version of torch runs on does, but for Maxwell cards."""
    assert choose_precision(Hardware(device_type="cuda", native_bf16=False), None).value == "fp16"


def test_the_hardware_is_told_by_name() -> None:
    """Two texts in a row would be mixed up."""
    with pytest.raises(TypeError):
        Hardware("cuda", "T4")  # type: ignore[misc]


PRECISIONS = st.none() | st.sampled_from(("fp32", "fp16", "bf16", "BF16", " fp16 "))


@given(PROFILES, PRECISIONS, PRECISIONS)
def test_precision_overrides_win_in_order(profile: HardwareProfile, flag: str | None, variable: str | None) -> None:
    """The flag, then the variable, then the device; the choice says which it was."""
    with simulated_hardware(profile), environment(**{PRECISION: variable}):
        choice = choose_precision(query_hardware(), asked_precision(flag))
        flags = determine_precision_flags()
    if flag is not None:
        assert (choice.value, choice.reason) == (flag.strip().lower(), "set by --precision")
    if variable is not None:
        named = variable.strip().lower()
        assert flags == (named == "fp16", named == "bf16")
        if flag is None:
            assert (choice.value, choice.reason) == (named, f"set by {PRECISION}")


@given(PROFILES, NO_COUNTS)
def test_batch_overrides_are_validated(profile: HardwareProfile, text: str) -> None:
    """A value that is no count is quoted, and its source named, whatever the device."""
    with simulated_hardware(profile):
        for name in (MICRO_BATCH, ACCUMULATION):
            with environment(**{name: text}), pytest.raises(SelectionError, match=f"^{name} must be a whole number"):
                determine_batch_hparams()
        for argument, flag in (("per_device_override", "--micro-batch"), ("grad_accum_override", "--grad-accum")):
            with pytest.raises(SelectionError, match=f"^{flag} must be a whole number"):
                determine_batch_hparams(**{argument: text})  # type: ignore[arg-type]


@given(PROFILES, st.sampled_from(("", "fp8", "float16", "bf16,fp16", "bf 16")))
def test_precision_overrides_are_validated(profile: HardwareProfile, text: str) -> None:
    """An unknown precision is quoted, and the valid ones are listed."""
    with simulated_hardware(profile), environment(**{PRECISION: text}):
        with pytest.raises(SelectionError, match=f"^{PRECISION} must be one of fp32, bf16, fp16, not '{text}'$"):
            determine_precision_flags()
        with pytest.raises(SelectionError, match=r"^--precision must be one of fp32, bf16, fp16"):
            asked_precision(text)


def failing(profile: HardwareProfile, query: str) -> HardwareProfile:
    others = tuple(f for f in profile.unanswered if f.query != query)
    return dataclasses.replace(profile, unanswered=(FailedQuery(query, "driver gone"), *others))


BROKEN = GPUS.flatmap(lambda profile: st.sampled_from(ASKED_OF[profile.device_type]).map(lambda q: failing(profile, q)))


@given(BROKEN)
def test_what_cannot_be_read_gives_the_safe_choice_and_says_so(profile: HardwareProfile) -> None:
    """A query that raises: its own words are in the reason, and nothing large or narrow is chosen."""
    with simulated_hardware(profile):
        micro_batch, _, precision = choices()
    assert precision.value == "fp32"
    failed = [f for query in ASKED_OF[profile.device_type] if (f := profile.failure_of(query))]
    assert any(" ".join(f.message.split()) in precision.reason for f in failed)
    assert "could not be asked" in precision.reason
    # nothing says then that there is a GPU
    if profile.failure_of("is_available"):
        assert micro_batch.value == 8
        assert "could not be asked" in micro_batch.reason
    elif _memory_is_unknown(profile):
        assert micro_batch.value == 2
        assert "safe choice" in micro_batch.reason


@given(GPUS)
def test_zero_memory_gives_the_safe_choice_and_says_so(profile: HardwareProfile) -> None:
    """A driver that reports zero is not read as a small GPU without a word."""
    assume(not any(profile.failure_of(query) for query in ASKED))
    with simulated_hardware(dataclasses.replace(profile, total_memory_bytes=0, free_memory_bytes=0)):
        micro_batch, accumulation, _ = choices()
    assert (micro_batch.value, accumulation.value) == (2, 16)
    assert "safe choice" in micro_batch.reason
    assert "reports no memory" in micro_batch.reason


@given(PROFILES, TARGETS)
def test_the_choice_is_deterministic(profile: HardwareProfile, target: int) -> None:
    """Asked twice, and on the machine met a second time, it is the same, reasons included."""
    with simulated_hardware(profile):
        first, again = choices(target), choices(target)
    with simulated_hardware(profile):
        later = choices(target)
    assert first == again == later


@given(PROFILES, TARGETS)
def test_every_choice_carries_a_reason(profile: HardwareProfile, target: int) -> None:
    """And the one for the precision names the device type, or what the device says of itself."""
    with simulated_hardware(profile):
        made = choices(target)
    assert all(choice.reason.strip() for choice in made)
    if profile.device_type in ("cpu", "mps", "xpu") and not unreadable(profile):
        assert made[2].reason == f"the default on {profile.device_type.upper()}"
    if profile.device_type == "cuda" and not unreadable(profile):
        assert f"compute capability {profile.capability}:" in made[2].reason
    if profile.device_type == "rocm" and not unreadable(profile):
        assert str(profile.architecture) in made[2].reason


@given(PROFILES, TARGETS)
def test_the_functions_choose_what_the_command_line_says(profile: HardwareProfile, target: int) -> None:
    """The two functions and the choices with their reasons are one thing."""
    with simulated_hardware(profile):
        micro_batch, accumulation, precision = choices(target)
        assert determine_batch_hparams(target) == (micro_batch.value, accumulation.value)
        assert determine_precision_flags() == (precision.value == "fp16", precision.value == "bf16")


def test_a_t4_takes_float16_and_says_why() -> None:
    """Torch says that bf16 is supported there; the reason says that it is emulated."""
    import torch

    with simulated_hardware("T4"):
        assert torch.cuda.is_bf16_supported()
        assert determine_precision_flags() == (True, False)
        assert choices()[2] == Selection("fp16", "compute capability 7.5: bf16 would only be emulated")


SOLD_AS = {
    (2, "fp16"): ["RTX 2060"],
    (2, "bf16"): ["A100 MIG 1g.5gb"],
    (4, "fp32"): ["K80"],
    (4, "fp16"): ["P100", "T4", "RX 6800 XT"],
    (4, "bf16"): ["RTX 3060", "A100 MIG 2g.10gb"],
    (8, "fp32"): ["CPU", "M1", "Arc A770", "M40"],
    (8, "fp16"): ["V100 32GB"],
    (8, "bf16"): ["RTX 4090", "RX 7900 XTX"],
    (16, "bf16"): ["A100 80GB", "H100", "MI300X"],
}
"""Devices by the micro-batch and the precision that they get."""


@pytest.mark.parametrize(
    ("name", "micro_batch", "precision"), [(name, *choice) for choice, names in SOLD_AS.items() for name in names]
)
def test_what_known_devices_get(name: str, micro_batch: int, precision: str) -> None:
    """As they are sold."""
    with simulated_hardware(name):
        chosen = choices()
    assert (chosen[0].value, chosen[2].value) == (micro_batch, precision)


@pytest.mark.parametrize(
    ("name", "target", "reasons"),
    [
        ("T4", 32, ("16.0 GB of GPU memory, below 20 GB", "effective batch 32")),
        ("T4", 4, ("16.0 GB of GPU memory, below 20 GB", "effective batch 4")),
        ("T4", 4096, ("16.0 GB of GPU memory, below 20 GB", "effective batch 4096")),
        ("T4", 3, ("the effective batch asked for is 3", "effective batch 3")),
        ("T4", 33, ("16.0 GB of GPU memory, below 20 GB", "effective batch 32, as near 33 as 4 allows")),
        ("T4", 34, ("16.0 GB of GPU memory, below 20 GB", "effective batch 36, as near 34 as 4 allows")),
        ("RTX 2060", 32, ("6.0 GB of GPU memory, below 10 GB", "effective batch 32")),
        ("RTX 3090", 32, ("24.0 GB of GPU memory, below 40 GB", "effective batch 32")),
        ("A100 40GB", 32, ("40.0 GB of GPU memory, 40 GB or more", "effective batch 32")),
        ("CPU", 32, ("the default on CPU", "effective batch 32")),
    ],
)
def test_the_reasons_of_a_batch(name: str, target: int, reasons: tuple[str, str]) -> None:
    """In the words that the user reads."""
    with simulated_hardware(name):
        micro_batch, accumulation, _ = choices(target)
    assert (micro_batch.reason, accumulation.reason) == reasons


def test_a_given_accumulation_is_a_reason_only_where_it_changes_something() -> None:
    """8 steps of 4 are 32 anyway; 16 steps leave 2."""
    hardware = Hardware(device_type="cuda", memory_bytes=16 * GIB)
    kept, _ = choose_batch(32, hardware, None, Selection(8, "asked"))
    changed, _ = choose_batch(32, hardware, None, Selection(16, "asked"))
    assert kept == Selection(4, "16.0 GB of GPU memory, below 20 GB")
    assert changed == Selection(2, "brings 16 accumulation steps near 32")


def test_the_reason_has_the_memory_to_a_tenth() -> None:
    """A T4 tells of less than it is sold with."""
    with simulated_hardware(dataclasses.replace(device_named("T4"), total_memory_bytes=GIB * 1456 // 100)):
        assert choices()[0].reason == "14.6 GB of GPU memory, below 20 GB"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("K80", "compute capability 3.7: bf16 and fp16 would only be emulated"),
        ("T4", "compute capability 7.5: bf16 would only be emulated"),
        ("H100", "compute capability 9.0: bf16 is native"),
        ("MI300X", "ROCm 6.4.43482 gfx942: bf16 is native"),
        ("RX 6800 XT", "ROCm 6.4.43482 gfx1030: bf16 would only be emulated"),
        ("M1", "the default on MPS"),
    ],
)
def test_the_reason_of_a_precision(name: str, reason: str) -> None:
    """In the words that the user reads."""
    with simulated_hardware(name):
        assert choices()[2].reason == reason


def test_every_known_device_gets_the_target_batch() -> None:
    """32 rows per optimizer step, on each of them."""
    for name in KNOWN_DEVICES:
        with simulated_hardware(name):
            micro_batch, accumulation = determine_batch_hparams()
        assert micro_batch * accumulation == 32


@pytest.mark.parametrize(
    ("memory", "reason"),
    [
        (-1, "the safe choice, since the GPU's memory could not be read (it reports no memory)"),
        (0, "the safe choice, since the GPU's memory could not be read (it reports no memory)"),
        (1, "0.0 GB of GPU memory, below 10 GB"),
    ],
)
def test_the_least_memory_that_is_one(memory: int, reason: str) -> None:
    """Torch gives no negative number; if it did, it would be no memory."""
    assert largest_micro_batch(Hardware(device_type="cuda", memory_bytes=memory)) == Selection(2, reason)


def test_a_long_message_is_cut() -> None:
    """A driver's may fill a screen; 160 characters of it are told, without its line breaks."""
    failure = FailedQuery("is_available", "one\n\ttwo " + 200 * "x")
    with simulated_hardware(dataclasses.replace(device_named("T4"), unanswered=(failure,))):
        trouble = query_hardware().trouble
    assert trouble == f"SimulatedQueryError: one two {200 * 'x'}"[:160]


def test_two_failures_are_both_told() -> None:
    """The reasons hold each message once."""
    failures = (FailedQuery("get_device_properties", "no memory"), FailedQuery("get_device_capability", "no number"))
    with simulated_hardware(dataclasses.replace(device_named("T4"), unanswered=failures)):
        micro_batch, _, precision = choices()
    for reason in (micro_batch.reason, precision.reason):
        assert reason.count("no memory") == 1
        assert reason.count("no number") == 1
