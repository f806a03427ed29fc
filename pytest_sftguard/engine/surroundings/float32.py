"""torch's switches for products of float32 in tf32: reading and restoring them, in both of torch's APIs.

Since torch 2.9 there is `fp32_precision` for everything, for each library, and for each of its operations; "none"
inherits the wider switch, and transformers sets the widest. The older `allow_tf32` and `set_float32_matmul_precision`
set single operations, which then no longer inherit, and reading them raises RuntimeError if the two APIs disagree.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

_NEW = hasattr(torch.backends, "fp32_precision")
_WIDER = (("generic", "all"), ("cuda", "all"), ("mkldnn", "all"))
_OPERATIONS = tuple((library, of) for library in ("cuda", "mkldnn") for of in ("matmul", "conv", "rnn"))
"""Library and operation as torch._C names them; the public switch for all of oneDNN sets the widest instead."""


def products_in_tf32() -> bool:
    """Whether the products of float32 matrices are computed in tf32 on CUDA."""
    if _NEW:
        return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")
    return bool(torch.backends.cuda.matmul.allow_tf32)


def forget_requests() -> None:
    """Let `TrainingArguments(tf32=...)` set the switches, as it does in a fresh process.

    transformers caches the request and ignores the same request later, even if the switches have changed since.
    """
    from transformers.utils import import_utils

    clear = getattr(getattr(import_utils, "enable_tf32", None), "cache_clear", None)
    if clear is not None:
        clear()


def snapshot() -> Callable[[], None]:
    """Return a function that restores every switch to its present value."""
    if not _NEW:
        return _snapshot_of_flags()
    older, newer = _older(), _own_values()

    def restore() -> None:
        if older is not None and older != _older():
            # sets operations of two libraries as well; they come next
            torch.set_float32_matmul_precision(older)
        for place, value in _own_values().items():
            if value != newer[place]:
                _set(place, newer[place])

    return restore


def _older() -> str | None:
    """The setting of the older API; None if it cannot be read because the newer one disagrees."""
    with contextlib.suppress(RuntimeError):
        return torch.get_float32_matmul_precision()
    return None


def _own_values() -> dict[tuple[str, str], str]:
    """Value of each switch itself. torch only returns the inherited result, so the wider ones are off meanwhile."""
    values = {}
    for place in _WIDER:
        values[place] = _get(place)
        _set(place, "none")
    values |= {place: _get(place) for place in _OPERATIONS}
    for place in _WIDER:
        _set(place, values[place])
    return values


def _get(place: tuple[str, str]) -> str:
    core: Any = torch._C
    return str(core._get_fp32_precision_getter(*place))


def _set(place: tuple[str, str], value: str) -> None:
    core: Any = torch._C
    core._set_fp32_precision_setter(*place, value)


def _snapshot_of_flags() -> Callable[[], None]:
    products, others = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    precision = torch.get_float32_matmul_precision()

    def restore() -> None:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = products, others

    return restore
