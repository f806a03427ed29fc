"""The adapter apart from its base: which tensors are which, and the adapter's way through a file."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pytest_sftguard.engine.tensors.reductions import digests, dtype_name

WEIGHTS = "adapter_model.safetensors"
_OUTSIDE_LAYERS = ("modules_to_save", "trainable_tokens_")
_TAKEN_FROM_THE_BASE = ("pissa", "olora", "corda", "lora_ga")


def trainables(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter that takes a gradient, by name."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer that is not part of the adapter, by name; they must not change."""
    buffers = model.named_buffers(remove_duplicate=False)  # rotary layers share one, until a forward pass parts them
    everything = {**dict(model.named_parameters()), **dict(buffers)}
    return {n: t for n, t in everything.items() if not is_adapter(model, n)}


def is_adapter(model: nn.Module, name: str) -> bool:
    """Whether the tensor called `name` is part of the adapter that is active, and saved with it.

    An adapter that is not active is part of the base: it must not change either. In a model without peft, everything
    that is trainable counts as the adapter.
    """
    tuner: Any = getattr(model, "base_model", None)
    configs: Any = getattr(model, "peft_config", None)
    prefix = getattr(tuner, "prefix", None)
    if prefix is None or configs is None:
        return name in trainables(model)
    parts = name.split(".")
    for part, following in zip(parts, (*parts[1:], ""), strict=True):
        if part.startswith((prefix, *_OUTSIDE_LAYERS)):
            return following not in configs or following in active_adapters(model)
    biases = any(getattr(c, "bias", "none") not in ("none", None) for c in configs.values())
    return biases and parts[-1] == "bias" and name in trainables(model)


def base_digests(model: nn.Module) -> dict[str, str]:
    """Digest of each base tensor."""
    return digests(base_tensors(model).items())


def adapted_layers(model: nn.Module) -> list[nn.Module]:
    """The original layers that adapters are attached to; every linear layer where none is."""
    inner = [getattr(m, "base_layer", None) for m in model.modules()]
    wrapped: list[nn.Module] = [m for m in inner if isinstance(m, nn.Module)]
    return wrapped or [m for m in model.modules() if isinstance(m, nn.Linear)]


def product_layers(model: nn.Module) -> list[nn.Module]:
    """Those of the adapted layers whose result is a matrix product, so that its type tells of the arithmetic.

    An embedding looks up, in the type of its weights. A module of which peft adapts a parameter (a block of experts, a
    router) does more after its products, and returns what comes of it.
    """
    blocks = {id(getattr(m, "base_layer", None)) for m in model.modules() if _adapts_parameter(m)}
    return [m for m in adapted_layers(model) if not isinstance(m, nn.Embedding) and id(m) not in blocks]


def lora_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that hold factors, by name; the tensors of an adapter have the name of theirs as a prefix."""
    return {n: m for n, m in model.named_modules() if hasattr(m, "base_layer")}


def partial_factors(model: nn.Module) -> set[str]:
    """Names of the factors of which a step may leave out elements: those of experts that got no token."""
    blocks = [(n, m) for n, m in model.named_modules() if _adapts_parameter(m)]
    return {f"{n}.{p}" for n, m in blocks for p, _ in m.named_parameters() if not p.startswith("base_layer.")}


def _adapts_parameter(module: nn.Module) -> bool:
    return hasattr(module, "base_layer") and hasattr(module, "parameter_name")


def weights_dtypes(model: nn.Module) -> dict[str, int]:
    """Types of the adapted layers' own weights, with the number of layers."""
    weights = [getattr(layer, "weight", None) for layer in adapted_layers(model)]
    return dict(Counter(dtype_name(w.dtype) for w in weights if isinstance(w, Tensor)))


def saved_tensors(trained: nn.Module, folder: Path) -> dict[str, Tensor]:
    """What the file of the active adapter holds, by the names of `in_file`; nothing where there is no file."""
    from safetensors.torch import load_file

    path = folder_of(trained, folder) / WEIGHTS
    return {in_file(n): t for n, t in load_file(path).items()} if path.exists() else {}


def folder_of(trained: nn.Module, folder: Path) -> Path:
    """Where peft saves the active adapter: one of another name in a folder of its own."""
    name = active_adapters(trained)[0]
    return folder if name == "default" or folder.name == name else folder / name


def base_differs(config: Any) -> str:
    """Why a model with the adapter of `config` disabled is not the base, soundly; empty where it must be."""
    if str(getattr(config, "init_lora_weights", "")).lower().startswith(_TAKEN_FROM_THE_BASE):
        return "the adapter starts as a part of the base's weights, which the base lacks without it"
    if getattr(config, "bias", "none") not in ("none", None):
        return "the base's own biases are trained, and stay where the adapter is disabled"
    return ""


def takes_from_the_base(fresh: Any) -> bool:
    """Whether the adapter starts as a part of the base's weights, which the base loses, and gets back by merging."""
    init = getattr(active_config(fresh), "init_lora_weights", "")
    return str(init).lower().startswith(_TAKEN_FROM_THE_BASE)


def active_config(model: Any) -> Any:
    """The configuration of the active adapter."""
    return getattr(model, "peft_config", {}).get(active_adapters(model)[0])


def active_adapters(model: nn.Module) -> list[str]:
    """Names of the adapters that are active, the first of them the one that is saved."""
    active: Any = getattr(model, "active_adapters", None)
    return list(active) if isinstance(active, (list, tuple)) and active else ["default"]


def in_file(name: str, adapter: str = "default") -> str:
    """The name of a tensor with all that differs between a model and an adapter file taken away."""
    name = name.replace(f".modules_to_save.{adapter}", "").replace(f".{adapter}", "")
    return name.replace(".base_layer.", ".").removesuffix(".weight")


@contextlib.contextmanager
def eager(model: nn.Module) -> Iterator[bool]:
    """Run with eager attention, and say whether it is.

    On a CPU sdpa turns NaN queries into zeros below 16 tokens (pytorch#141128).
    """
    peft: Any = model
    inner: Any = peft.get_base_model() if hasattr(model, "get_base_model") else model
    before = getattr(getattr(inner, "config", None), "_attn_implementation", None)
    try:
        inner.set_attn_implementation("eager")
    except (AttributeError, ValueError, NotImplementedError):  # not every architecture has a choice
        before = None
    try:
        yield getattr(getattr(inner, "config", None), "_attn_implementation", None) == "eager"
    finally:
        if before is not None:
            inner.set_attn_implementation(before)
