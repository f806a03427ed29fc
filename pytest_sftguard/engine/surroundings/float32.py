"""Whether products of float32 are computed in tf32, by either of torch's two ways to say so, and putting that back.

From torch 2.9 on there is `fp32_precision` for everything, for each library, and for each of its operations, where
"none" asks the wider one; transformers sets the widest. The older `allow_tf32` and `set_float32_matmul_precision` set
single operations, which from then on no longer ask, and raise RuntimeError where both ways disagree.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

_NEW = hasattr(torch.backends, "fp32_precision")
_WIDER = (("generic", "all"), ("cuda", "all"), ("mkldnn", "all"))
_OPERATIONS = tuple((library, of) for library in ("cuda", "mkldnn") for of in ("matmul", "conv", "rnn"))
"""Library and operation, as torch._C names them: its public switch for all of oneDNN sets the widest instead."""


def products_in_tf32() -> bool:
    """Whether the products of float32 matrices are computed in tf32 on CUDA."""
    if _NEW:
        return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")
    return bool(torch.backends.cuda.matmul.allow_tf32)


def forget_requests() -> None:
    """Let `TrainingArguments(tf32=...)` set the switches, as it does in a fresh process.

    transformers remembers what it was asked for once, and does nothing when it is asked for the same again, though the
    switches have been set otherwise since.
    """
    from transformers.utils import import_utils

    clear = getattr(getattr(import_utils, "enable_tf32", None), "cache_clear", None)
    if clear is not None:
        clear()


def remembered() -> Callable[[], None]:
    """What puts every switch back as it is now."""
    if not _NEW:
        return _remembered_by_flags()
    older, newer = _older(), _set_values()

    def put_back() -> None:
        if older is not None and older != _older():
            torch.set_float32_matmul_precision(older)  # sets operations of two libraries besides; they come next
        for place, value in _set_values().items():
            if value != newer[place]:
                _set(place, newer[place])

    return put_back


def _older() -> str | None:
    """The older setting; None where it cannot be read, because it disagrees with the newer one."""
    with contextlib.suppress(RuntimeError):
        return torch.get_float32_matmul_precision()
    return None


def _set_values() -> dict[tuple[str, str], str]:
    """What each switch itself is set to: torch tells what comes of all, so that the wider ones are off meanwhile."""
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


def _remembered_by_flags() -> Callable[[], None]:
    products, others = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    precision = torch.get_float32_matmul_precision()

    def put_back() -> None:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = products, others

    return put_back
