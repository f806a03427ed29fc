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
    older = _older()
    newer = [(place, place.fp32_precision) for place in _places()]

    def put_back() -> None:
        if older is not None and older != _older():
            torch.set_float32_matmul_precision(older)  # sets operations of two libraries besides; they come next
        for place, was in newer:
            if place.fp32_precision != was:
                place.fp32_precision = was

    return put_back if _NEW else _remembered_by_flags()


def _older() -> str | None:
    """The older setting; None where it cannot be read, because it disagrees with the newer one."""
    with contextlib.suppress(RuntimeError):
        return torch.get_float32_matmul_precision()
    return None


def _places() -> list[Any]:
    """What has an `fp32_precision`, from the widest on."""
    if not _NEW:
        return []
    backends: Any = torch.backends
    cudnn, onednn = backends.cudnn, backends.mkldnn
    inner = [backends.cuda.matmul, cudnn.conv, cudnn.rnn, onednn.matmul, onednn.conv, onednn.rnn]
    return [backends, cudnn, onednn, *inner]


def _remembered_by_flags() -> Callable[[], None]:
    products, others = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    precision = torch.get_float32_matmul_precision()

    def put_back() -> None:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = products, others

    return put_back
