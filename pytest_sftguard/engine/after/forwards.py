"""Forward passes outside the training: a model's arguments and outputs, attention and types, distances of logits."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from pytest_sftguard.precision import PrecisionMode


def inner(model: Any) -> Any:
    """The transformers model in a PeftModel, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def embeddings(model: Any, side: str = "input") -> Any:
    """The module that embeds tokens, or with `side="output"` the head over them; None where the model has none.

    Models of transformers without tokens have a method that raises, those of other libraries need not have one.
    """
    getter = getattr(inner(model), f"get_{side}_embeddings", None)
    try:
        return None if getter is None else getter()
    except (AttributeError, NotImplementedError):
        return None


def padding_id(model: Any) -> int:
    """The id that the model declares as padding; 0 where it declares none, or one beyond its vocabulary."""
    pad = getattr(getattr(inner(model), "config", None), "pad_token_id", None)
    weight = getattr(embeddings(model), "weight", None)
    count = len(weight) if isinstance(weight, Tensor) and weight.dim() == 2 else None
    return pad if isinstance(pad, int) and pad >= 0 and (count is None or pad < count) else 0


def in_float32(value: Any) -> Any:
    """Tensors of half precision in float32, also within dicts, lists and tuples, for a model with such weights."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() and value.element_size() < 4 else value
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(map(in_float32, value))
    if isinstance(value, MutableMapping):
        twin = copy.copy(value)
        for key in value:
            twin[key] = in_float32(value[key])
        return twin
    return value


def accepts(model: Any) -> set[str]:
    """Names of the explicit arguments of the transformers model's forward pass."""
    return set(inspect.signature(inner(model).forward).parameters)


_OF_THE_LOSS = ("labels", "shift_labels", "num_items_in_batch", "logits_to_keep", "return_dict", "fused_lm_head")
"""Arguments that choose which logits are computed, or their form. The last one is TRL's, for a loss without logits."""


def given(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a forward pass of `model` by name, without those of the loss.

    The labels of an encoder-decoder are kept, because it makes the inputs of its decoder from them.
    """
    named = _by_name(model, args) | dict(kwargs)
    decodes = getattr(getattr(inner(model), "config", None), "is_encoder_decoder", False)
    left_out = [name for name in _OF_THE_LOSS if not (decodes and name == "labels")]
    return {k: v for k, v in named.items() if k not in left_out}


def _by_name(model: Any, args: tuple[Any, ...]) -> dict[str, Any]:
    """Arguments that were given by position, by their names; a wrapper may take them as they come."""
    for held in (model, inner(model)) if args else ():
        named = dict(inspect.signature(held.forward).bind_partial(*args).arguments)
        if "args" not in named:
            return named
    return {}


def asked(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    """The main output of `model` for `inputs`; equal inputs see equal random numbers.

    Torch's generators are left as they were. Raises ValueError where the model returns no tensor.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return main_output(model(**inputs))


def main_output(output: Any) -> Tensor:
    """The logits in what a model returned, or else its first tensor of floating-point numbers that is not the loss.

    Raises ValueError where there is none.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        named = dict(output)
    else:
        plain = output if isinstance(output, (list, tuple)) else list(vars(output).values())
        named = {str(i): value for i, value in enumerate(plain)}
    named.setdefault("logits", getattr(output, "logits", None))
    for value in (named.pop("logits"), *(v for k, v in named.items() if k != "loss")):
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim():
            return value
    raise ValueError(f"a {type(output).__name__} without a tensor of numbers")


def loss_of(output: Any) -> Tensor | None:
    """The loss, one number, in what a model returned: its member `loss`, or the first of a tuple; None without one."""
    if isinstance(output, Mapping):
        loss = output.get("loss")
    else:
        loss = output[0] if isinstance(output, tuple) and output else getattr(output, "loss", None)
    return loss if isinstance(loss, Tensor) and loss.is_floating_point() and loss.numel() == 1 else None


def attention_of(model: Any) -> str:
    """Name of the model's attention implementation; empty if it has no choice."""
    return str(getattr(getattr(inner(model), "config", None), "_attn_implementation", None) or "")


def checkpointing(model: Any) -> list[Any]:
    """The modules with gradient checkpointing.

    Read from the modules, because transformers 5.23 warns of `is_gradient_checkpointing`, and 5.17 has no other name.
    """
    return [m for m in inner(model).modules() if getattr(m, "gradient_checkpointing", False)]


def arithmetic(mode: PrecisionMode, *, autocast: bool = False) -> str:
    """Name of the type of matrix products in `mode`, with or without its autocast."""
    if autocast:
        return mode.compute_dtype
    return "tf32" if mode.name == "tf32" else mode.weights_dtype


_WIDENED = 500_000_000
"""Largest number of parameters of a model that is widened to float32, which takes 2 GB."""


@contextlib.contextmanager
def widened(model: Any, mode: PrecisionMode) -> Iterator[str]:
    """Give a `model` in half precision weights of float32 within; yields the type in which it computes.

    In float32 a difference of 1e-4 is significant, in bfloat16 only one of 1e-1, and rounding does not change which
    expert is chosen. A large model, or one whose weights or attention do not support float32, is left as it is.

    The weights are exchanged in place, and put back: a copy of a model whose forward method somebody has replaced may
    still run the original's, as with TRL's fused head.
    """
    tensors = [*model.parameters(), *model.buffers()]
    half = {t.dtype for t in tensors if isinstance(t, nn.Parameter) and t.is_floating_point() and t.element_size() < 4}
    if not half:
        yield arithmetic(mode)
        return
    plain = all(p.is_floating_point() and p.element_size() > 1 for p in model.parameters())
    if not plain or "flash" in attention_of(model) or sum(p.numel() for p in model.parameters()) > _WIDENED:
        yield mode.weights_dtype
        return
    narrow = [(t, t.data) for t in tensors if t.is_floating_point() and t.element_size() < 4]
    config: Any = getattr(inner(model), "config", None)
    declared = getattr(config, "dtype", None)
    try:
        for tensor, data in narrow:
            tensor.data = data.float()
        if declared is not None:
            config.dtype = torch.float32
        yield "float32"
    finally:
        for tensor, data in narrow:
            tensor.data = data
        if declared is not None:
            config.dtype = declared


def has_experts(model: nn.Module) -> bool:
    """Whether the model routes tokens to experts, so that rounding can change which one is chosen."""
    return any("expert" in name or "router" in name for name, _ in model.named_modules())


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; restores the mode of each module, because they need not be equal."""
    before = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in before:
            module.training = training


def dropouts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules that drop activations, or attention, in training mode, with their names."""
    found = []
    for name, module in model.named_modules():
        rate = getattr(module, "p", getattr(module, "drop_prob", 0)) if "Dropout" in type(module).__name__ else 0
        rates = (rate, getattr(module, "attention_dropout", 0))
        if any(isinstance(r, (int, float)) and r > 0 for r in rates):
            found.append((name, module))
    return found


@contextlib.contextmanager
def dropping(model: nn.Module) -> Iterator[set[str]]:
    """Collect the names of the modules of `model` that drop something within."""
    active: set[str] = set()

    def noting(name: str) -> Any:
        def note(module: nn.Module, args: Any) -> None:
            if module.training:
                active.add(name)

        return note

    hooks = [m.register_forward_pre_hook(noting(n)) for n, m in dropouts(model)]
    try:
        yield active
    finally:
        for hook in hooks:
            hook.remove()


def nonfinite(logits: Tensor) -> Tensor:
    """Whether the scores of a token contain NaN or +inf, or are all -inf. Shape without the last dimension.

    Single scores of -inf are sound: an architecture excludes the padding of its vocabulary with them.
    """
    return ~logits.float().amax(-1).isfinite()


def distance(logits: Tensor, others: Tensor) -> Tensor:
    """Distance between the scores of each token, relative to the norm of `others`; both centred, as softmax sees them.

    Shape without the last dimension; 0 for tokens whose scores are not finite in both.
    """
    one, other = logits.float(), others.float()
    useless = nonfinite(one) | nonfinite(other)
    excluded = one.isneginf() & other.isneginf()
    gap = torch.where(excluded, 0.0, one - other)
    scale = torch.where(other.isneginf(), 0.0, other)
    gap, scale = gap - gap.mean(-1, keepdim=True), scale - scale.mean(-1, keepdim=True)
    found = gap.norm(dim=-1) / scale.norm(dim=-1).clamp_min(1e-20)
    return torch.where(useless, 0.0, found)
