"""Quantised bases: what a target is given to make one, and bitsandbytes' layout of weights on a CPU.

On a CPU with AVX512-BF16 a 4-bit layer of bitsandbytes rearranges its weights in its first forward pass in evaluation
mode, and rounds their scales. No gradient passes through it from then on. `state_dict()` rearranges the weights back,
and loses scales on its way (0.50.2: logits are off by 0.5 to 11 afterwards). So the guard's own models never rearrange,
and saving leaves the trained one as it was.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pytest_sftguard.precision import PrecisionMode

LIBRARY = "bitsandbytes"
_SWITCH = "support_avx512bf16_for_cpu"
_NIBBLES = 32
"""Output rows that bitsandbytes interleaves: 32 low halves of bytes beside 32 high ones."""


def lacks_library(mode: PrecisionMode) -> str | None:
    """Why no base can be quantised for `mode` here; None if it can, or need not be."""
    if not mode.quantisation or importlib.util.find_spec(LIBRARY):
        return None
    return f"{mode.name} needs {LIBRARY}: pip install pytest-sftguard[qlora]"


def config_for(mode: PrecisionMode) -> Any:
    """The `quantization_config` that a target passes to `from_pretrained` in `mode`."""
    from transformers import BitsAndBytesConfig

    compute_dtype = getattr(torch, mode.compute_dtype)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=mode.quantisation, bnb_4bit_compute_dtype=compute_dtype
    )


def keep_layout(model: nn.Module) -> None:
    """Let the 4-bit layers of `model` keep the layout of their weights in every forward pass from now on."""
    for module in _layers(model):
        setattr(module, _SWITCH, False)


def like(model: nn.Module, trained: nn.Module) -> None:
    """Let `model` rearrange its weights where an evaluation of the training has rearranged those of `trained`.

    Both then compute with the same rounded scales.
    """
    if any(map(is_rearranged, _layers(trained))):
        for module in _layers(model):
            setattr(module, _SWITCH, True)


def is_rearranged(layer: Any) -> bool:
    """Whether the weights of `layer` have the layout for inference on a CPU."""
    return _in_layout_for_inference(getattr(layer, "weight", None))


@contextlib.contextmanager
def kept(model: nn.Module) -> Iterator[None]:
    """Give the 4-bit layers of `model` back the weights and scales that they have now, whatever happens within."""
    before = [(m.weight, m.weight.data, m.weight.quant_state, dict(vars(m.weight.quant_state))) for m in _layers(model)]
    try:
        yield
    finally:
        for weight, data, state, values in before:
            weight.data, weight.quant_state = data, state
            vars(state).clear()
            vars(state).update(values)


def canonical(tensor: Tensor) -> Tensor:
    """The bits of a weight in the layout in which it was loaded, shape of the original; other tensors as they are."""
    if not _in_layout_for_inference(tensor):
        return tensor
    state: Any = tensor.quant_state  # type: ignore[attr-defined]
    rows, half = tensor.shape
    packed = tensor.detach().reshape(-1, _NIBBLES)
    interleaved = torch.cat([packed & 0xF, packed >> 4], dim=1)
    values = interleaved.reshape(rows // _NIBBLES, half, _NIBBLES, 2).transpose(1, 2).reshape(-1, 2)
    bits = ((values[:, 0] << 4) | values[:, 1]).reshape(state.original_qshape)
    storage = getattr(state, "original_storage_type", None)
    return bits.view(storage) if storage else bits


def _layers(model: nn.Module) -> list[Any]:
    """The 4-bit layers of bitsandbytes whose weights are quantised by now."""
    return [m for m in model.modules() if hasattr(m, _SWITCH) and getattr(m.weight, "quant_state", None) is not None]


def _in_layout_for_inference(weight: Any) -> bool:
    return bool(getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False))
