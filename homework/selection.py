"""Which batch and precision a run gets, and why.

The command line goes first, then the environment, then what the hardware allows. The `choose_` functions are pure.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

MICRO_BATCH_VARIABLE = "SFT_MICRO_BATCH_SIZE"
ACCUMULATION_VARIABLE = "SFT_GRAD_ACCUM_STEPS"
PRECISION_VARIABLE = "SFT_PRECISION"
PRECISIONS = ("fp32", "bf16", "fp16")

GB = 1024**3
"""Bytes in the GB of the table below."""
MICRO_BATCH_BELOW = ((10 * GB, 2), (20 * GB, 4), (40 * GB, 8))
"""(total GPU memory in bytes, micro-batch below it); above the last row it is LARGEST_MICRO_BATCH."""
LARGEST_MICRO_BATCH = 16
SMALLEST_MICRO_BATCH = 2
MICRO_BATCH_WITHOUT_CUDA = 8

FIRST_FP16 = (5, 3)
"""First CUDA compute capability with fp16 arithmetic."""
ROCM_WITHOUT_BF16 = re.compile(r"gfx(8..|90[02469c]|10..)")
"""AMD architectures before CDNA and RDNA 3, which have no bf16 arithmetic."""

T = TypeVar("T")


class SelectionError(ValueError):
    """A batch or precision that cannot be used; the message names where it came from and the valid values."""


@dataclass(frozen=True)
class Selection(Generic[T]):
    """A choice that carries its reason."""

    value: T
    """What was chosen."""
    reason: str
    """Why, in a few words for the console."""


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What the selectors need to know of the machine; with several GPUs, of the smallest."""

    device_type: str = "cpu"
    """`cuda` (ROCm too), `mps`, `xpu` or `cpu`."""
    name: str = ""
    """The device's own name."""
    memory_bytes: int | None = None
    """Total GPU memory; None where it could not be read."""
    native_bf16: bool | None = None
    """Whether the GPU computes in bf16 natively; None where it could not be read."""
    bf16_reason: str = ""
    """The evidence, for instance `compute capability 7.5`."""
    native_fp16: bool = True
    """Whether the GPU computes in fp16 natively."""
    trouble: str = ""
    """Messages of the queries that failed."""


def read_positive(text: str | int, source: str) -> int:
    """Return a whole number of at least 1, of at most nine digits. Raises SelectionError that names `source`."""
    digits = str(text).strip()
    if isinstance(text, bool) or not re.fullmatch(r"\+?[0-9]{1,9}", digits) or int(digits) < 1:
        raise SelectionError(f"{source} must be a whole number of 1 or more, not {text!r}")
    return int(digits)


def read_precision(text: str, source: str) -> str:
    """Return one of PRECISIONS. Raises SelectionError that names `source`."""
    if text.strip().lower() not in PRECISIONS:
        raise SelectionError(f"{source} must be one of {', '.join(PRECISIONS)}, not {text!r}")
    return text.strip().lower()


def _asked(given: str | int | None, flag: str, variable: str, read: Callable[[Any, str], T]) -> Selection[T] | None:
    """Return what the command line, else the environment, asks for; None where neither does."""
    source, asked = (flag, given) if given is not None else (variable, os.environ.get(variable))
    return None if asked is None else Selection(read(asked, source), f"set by {source}")


def largest_micro_batch(hardware: Hardware) -> Selection[int]:
    """Return the micro-batch that the hardware's memory allows."""
    if hardware.device_type != "cuda":
        return Selection(MICRO_BATCH_WITHOUT_CUDA, _default_on(hardware))
    if not hardware.memory_bytes or hardware.memory_bytes < 0:
        why = (hardware.trouble if hardware.memory_bytes is None else "") or "it reports no memory"
        return Selection(SMALLEST_MICRO_BATCH, f"the safe choice, since the GPU's memory could not be read ({why})")
    size = f"{hardware.memory_bytes / GB:.1f} GB of GPU memory"
    for limit, micro_batch in MICRO_BATCH_BELOW:
        if hardware.memory_bytes < limit:
            return Selection(micro_batch, f"{size}, below {limit // GB} GB")
    return Selection(LARGEST_MICRO_BATCH, f"{size}, {MICRO_BATCH_BELOW[-1][0] // GB} GB or more")


def nearest_multiple(target: int, step: int) -> int:
    """Return the n of at least 1 for which n * `step` is nearest to `target`; of two that are as near, the larger."""
    return max(1, (2 * target + step) // (2 * step))


def choose_batch(
    target: int, hardware: Hardware | None, micro_batch: Selection[int] | None, accumulation: Selection[int] | None
) -> tuple[Selection[int], Selection[int]]:
    """Return the per-device batch and the accumulation steps whose product is nearest to `target`.

    A number that was asked for is kept. `hardware` may be None where `micro_batch` was asked for. An automatic
    micro-batch is never above the target, and their product never overshoots by a full micro-batch.
    """
    if micro_batch is None:
        if hardware is None:
            raise SelectionError("an automatic micro-batch needs the hardware")
        micro_batch = largest_micro_batch(hardware)
        if accumulation is not None:
            fitting = nearest_multiple(target, accumulation.value)
            if fitting < micro_batch.value:
                micro_batch = Selection(fitting, f"brings {accumulation.value} accumulation steps near {target}")
        if target < micro_batch.value:
            micro_batch = Selection(target, f"the effective batch asked for is {target}")
    if accumulation is None:
        steps = nearest_multiple(target, micro_batch.value)
        effective = steps * micro_batch.value
        near = "" if effective == target else f", as near {target} as {micro_batch.value} allows"
        accumulation = Selection(steps, f"effective batch {effective}{near}")
    return micro_batch, accumulation


def choose_precision(hardware: Hardware | None, asked: Selection[str] | None) -> Selection[str]:
    """Return the precision: what was asked for, else bf16 where native, fp16 on older GPUs that have it, else fp32."""
    if asked is not None:
        return asked
    if hardware is None:
        raise SelectionError("an automatic precision needs the hardware")
    if hardware.device_type != "cuda":
        return Selection("fp32", _default_on(hardware))
    if hardware.native_bf16 is None:
        why = hardware.trouble or "the query gave nothing"
        return Selection("fp32", f"the safe choice, since the GPU could not be asked for bf16 ({why})")
    if hardware.native_bf16:
        return Selection("bf16", f"{hardware.bf16_reason}: bf16 is native")
    if not hardware.native_fp16:
        return Selection("fp32", f"{hardware.bf16_reason}: bf16 and fp16 would only be emulated")
    return Selection("fp16", f"{hardware.bf16_reason}: bf16 would only be emulated")


def _default_on(hardware: Hardware) -> str:
    why = f", since the GPU could not be asked ({hardware.trouble})" if hardware.trouble else ""
    return f"the default on {hardware.device_type.upper()}{why}"


def asked_precision(given: str | None = None) -> Selection[str] | None:
    """Return what --precision, else SFT_PRECISION, asks for; None where neither does. Raises SelectionError."""
    return _asked(given, "--precision", PRECISION_VARIABLE, read_precision)


def select_batch(
    target: int, micro_batch: int | str | None, accumulation: int | str | None, hardware: Hardware | None = None
) -> tuple[Selection[int], Selection[int]]:
    """Return `choose_batch` of the numbers given, then of the environment's; queries the hardware where needed.

    Raises SelectionError for a value that is no whole number of 1 or more.
    """
    target = read_positive(target, "target_batch_size")
    asked_micro = _asked(micro_batch, "--micro-batch", MICRO_BATCH_VARIABLE, read_positive)
    asked_steps = _asked(accumulation, "--grad-accum", ACCUMULATION_VARIABLE, read_positive)
    if asked_micro is None and hardware is None:
        hardware = query_hardware()
    return choose_batch(target, hardware, asked_micro, asked_steps)


def select_precision(asked: Selection[str] | None, hardware: Hardware) -> Selection[str]:
    """Return `choose_precision`. Raises SelectionError for fp16 on a CPU."""
    precision = choose_precision(hardware, asked)
    if precision.value == "fp16" and hardware.device_type == "cpu":
        raise SelectionError(
            f"fp16 ({precision.reason}) needs a GPU: on a CPU the Trainer would silently train in fp32; "
            "use fp32 or bf16"
        )
    return precision


def query_hardware() -> Hardware:
    """Query the hardware through torch. A query that raises is noted in `trouble` and never ends the run."""
    import torch

    try:
        if not torch.cuda.is_available():
            mps = torch.backends.mps.is_available()
            return Hardware(device_type="mps" if mps else "xpu" if torch.xpu.is_available() else "cpu")
    # a broken driver may raise anything, and the run can still go on
    except Exception as error:
        return Hardware(device_type="cpu", trouble=_words(error))
    trouble: list[str] = []
    count = _or_trouble(torch.cuda.device_count, trouble)
    if count is None:
        return Hardware(device_type="cuda", trouble=trouble[0])
    # a driver that counts no device although CUDA is available is wrong: the first device is queried
    devices = range(count or 1)
    read = [_or_trouble(partial(_name_and_memory, index), trouble) for index in devices]
    native = [_or_trouble(partial(_native, index), trouble) for index in devices]
    least = None if None in read else min(memory for _, memory in filter(None, read))
    worst = None if None in native else min(filter(None, native))
    return Hardware(
        device_type="cuda",
        name=next((name for name, _ in filter(None, read) if name), ""),
        memory_bytes=least,
        native_bf16=worst[0] if worst else None,
        native_fp16=worst[1] if worst else True,
        bf16_reason=worst[2] if worst else "",
        trouble="; ".join(dict.fromkeys(trouble)),
    )


def _name_and_memory(index: int) -> tuple[str, int]:
    import torch

    properties = torch.cuda.get_device_properties(index)
    return str(getattr(properties, "name", "")), int(properties.total_memory)


def _native(index: int) -> tuple[bool, bool, str]:
    """Return whether a device computes natively in bf16 and in fp16, and the evidence.

    `torch.cuda.is_bf16_supported()` is true on a T4, which emulates bf16, so on CUDA the capability decides. On ROCm it
    is true for every device, even without emulation, so a list of architectures that lack bf16 decides.
    """
    import torch

    if getattr(torch.version, "hip", None):
        architecture = str(getattr(torch.cuda.get_device_properties(index), "gcnArchName", "")).partition(":")[0]
        supported = bool(torch.cuda.is_bf16_supported(including_emulation=False))
        lacking = ROCM_WITHOUT_BF16.fullmatch(architecture)
        return supported and not lacking, True, f"ROCm {torch.version.hip} {architecture}".strip()
    major, minor = torch.cuda.get_device_capability(index)
    return major >= 8, (major, minor) >= FIRST_FP16, f"compute capability {major}.{minor}"


def _or_trouble(query: Callable[[], T], trouble: list[str]) -> T | None:
    try:
        return query()
    # a broken driver may raise anything, and the run can still go on
    except Exception as error:
        trouble.append(_words(error))
        return None


def _words(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]
