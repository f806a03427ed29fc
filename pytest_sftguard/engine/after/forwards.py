"""Forward passes beside the training: what a model accepts, how it is put into evaluation mode, how logits compare."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pytest_sftguard.precision import PrecisionMode


def inner(model: Any) -> Any:
    """The transformers model within a PeftModel, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def accepts(model: Any) -> set[str]:
    """Names of the arguments that the forward pass of the transformers model spells out."""
    return set(inspect.signature(inner(model).forward).parameters)


def attention_of(model: Any) -> str:
    """Name of the implementation of attention that `model` uses; empty where it has no choice."""
    return str(getattr(getattr(inner(model), "config", None), "_attn_implementation", None) or "")


def checkpointing(model: Any) -> list[Any]:
    """The modules that compute their forward pass a second time in the backward one.

    Asked of themselves: transformers 5.23 warns of `is_gradient_checkpointing`, and 5.17 knows no other name of it.
    """
    return [m for m in inner(model).modules() if getattr(m, "gradient_checkpointing", False)]


def arithmetic(mode: PrecisionMode, *, autocast: bool = False) -> str:
    """Name of the type that products have in `mode`, with its autocast or without."""
    if autocast:
        return mode.compute_dtype
    return "tf32" if mode.name == "tf32" else mode.weights_dtype


_WIDENED = 500_000_000
"""Parameters up to which a model is copied into float32: 2 GB."""


def widened(model: Any, mode: PrecisionMode) -> tuple[Any, str]:
    """A float32 copy of `model` where its weights are in half precision, or itself; and the type that it computes in.

    In float32 a difference of 1e-4 tells, in bfloat16 one of 1e-1; experts are not chosen otherwise by a rounding. A
    large model, or one whose weights or attention have no float32, is given back as it is.
    """
    half = {p.dtype for p in model.parameters() if p.is_floating_point() and p.element_size() < 4}
    if not half:
        return model, arithmetic(mode)
    plain = all(p.is_floating_point() and p.element_size() > 1 for p in model.parameters())
    if not plain or "flash" in attention_of(model) or sum(p.numel() for p in model.parameters()) > _WIDENED:
        return model, mode.weights_dtype
    wide = copy.deepcopy(model).float()
    inner(wide).config.dtype = torch.float32
    return wide, "float32"


def has_experts(model: nn.Module) -> bool:
    """Whether tokens are routed to experts, which a rounding can change."""
    return any("expert" in name or "router" in name for name, _ in model.named_modules())


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, without gradients; each module is put back as it was, for not all of them need be alike."""
    before = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in before:
            module.training = training


def nonfinite(logits: Tensor) -> Tensor:
    """Whether the scores of a token are of no use: NaN, +inf, or nothing but -inf. Shape without the last dimension.

    -inf alone is how an architecture shuts out ids that its vocabulary is padded with.
    """
    largest = logits.float().amax(-1)  # NaN where there is one
    return ~largest.isfinite()


def distance(logits: Tensor, others: Tensor) -> Tensor:
    """Distance of the scores of each token, relative to the norm of `others`; both centred, as softmax sees them.

    Shape without the last dimension. Tokens that are not finite in both have no distance: 0.
    """
    one, other = logits.float(), others.float()
    useless = nonfinite(one) | nonfinite(other)
    shut = one.isneginf() & other.isneginf()
    gap = torch.where(shut, 0.0, one - other)
    scale = torch.where(other.isneginf(), 0.0, other)
    gap, scale = gap - gap.mean(-1, keepdim=True), scale - scale.mean(-1, keepdim=True)
    found = gap.norm(dim=-1) / scale.norm(dim=-1).clamp_min(1e-20)
    return torch.where(useless, 0.0, found)
