"""Whether this process can still use its CUDA device.

Some failures of a kernel, an index out of range above all, end the process's use of the device: from then on every call
raises the same error, wherever it is made. What is on the host is left.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pytest_sftguard.engine.surroundings.errors import first_line

_lost: str | None = None


class LostError(RuntimeError):
    """Something that needs the device after it was lost; says what the device said when it was."""

    def __init__(self) -> None:
        super().__init__(
            f"this process lost its CUDA device in an earlier training, and cannot use it again; mend that one: {_lost}"
        )


def lost() -> str | None:
    """How this process lost its CUDA device, in one line; None as long as it has not been seen to."""
    return _lost


def answers(device_type: str) -> bool:
    """Whether the device of `device_type` still computes; waits until it has done what it was given."""
    global _lost
    if device_type != "cuda" or not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return True
    if _lost is not None:
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:  # torch.AcceleratorError, from 2.8 on; what was out of memory is not raised again
        _lost = first_line(error) or type(error).__name__
    return _lost is None


def copied(batch: Mapping[str, Any]) -> dict[str, Any]:
    """`batch`, with what lies on a CUDA device copied to the host in its turn; nothing is waited for."""
    return {key: _copy(value) for key, value in batch.items()}


def settled(copies: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What `copied` gave, in memory that has nothing to do with a device any more, which must still answer."""
    return [{k: v.clone() if isinstance(v, Tensor) else v for k, v in batch.items()} for batch in copies]


def rescued(copies: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same after the device was lost.

    The memory of the copies themselves is never given back: their release would ask the device, and end the process.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object([value for batch in copies for value in batch.values()]))
    return settled(copies)


def _copy(value: Any) -> Any:
    if not isinstance(value, Tensor) or value.device.type != "cuda":
        return value
    return torch.empty(value.shape, dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)
