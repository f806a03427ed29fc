"""Whether this process can still use its CUDA device, and copies of a batch that survive the device.

After some failures of a kernel, most often an index out of range, the process loses the device: every later call raises
the same error, wherever it is made. Only the data on the host is left.
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
    """A use of the device after it was lost; the message quotes the error that lost it."""

    def __init__(self) -> None:
        super().__init__(
            f"this process lost its CUDA device in an earlier training, and cannot use it again; mend that one: {_lost}"
        )


def lost() -> str | None:
    """First line of the error that lost this process its CUDA device; None if no such error was seen."""
    return _lost


def answers(device_type: str) -> bool:
    """Whether the device of `device_type` still computes; waits for the work that it was given."""
    global _lost
    if device_type != "cuda" or not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return True
    if _lost is not None:
        return False
    try:
        torch.cuda.synchronize()
    # torch.AcceleratorError from 2.8 on; an error for lack of memory is not raised again
    except RuntimeError as error:
        _lost = first_line(error) or type(error).__name__
    return _lost is None


def copied(batch: Mapping[str, Any]) -> dict[str, Any]:
    """`batch` with its CUDA tensors copied to the host asynchronously."""
    return {key: _copy(value) for key, value in batch.items()}


def settled(copies: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The batches of `copied` in memory that is independent of the device, which must still answer."""
    return [{k: v.clone() if isinstance(v, Tensor) else v for k, v in batch.items()} for batch in copies]


def rescued(copies: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same as `settled`, after the device was lost.

    The memory of `copies` is leaked on purpose: to free it, torch would call the device, which would end the process.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object([value for batch in copies for value in batch.values()]))
    return settled(copies)


def _copy(value: Any) -> Any:
    if not isinstance(value, Tensor) or value.device.type != "cuda":
        return value
    return torch.empty(value.shape, dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)
