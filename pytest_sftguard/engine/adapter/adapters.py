"""Adapter and base: which module carries the adapter, and which tensors belong to which."""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from pytest_sftguard.engine.after import forwards
from pytest_sftguard.engine.building import quantised
from pytest_sftguard.engine.tensors.reductions import digests, dtype_name

_OUTSIDE_LAYERS = ("modules_to_save", "trainable_tokens_")
_TAKEN_FROM_THE_BASE = ("pissa", "olora", "corda", "lora_ga")


def trainables(model: nn.Module) -> dict[str, Tensor]:
    """Every trainable parameter, by name."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def holder(model: nn.Module) -> tuple[str, Any]:
    """The module that carries the adapter, and its path in `model`; `model` itself and "" where nothing does.

    That is a PeftModel, or a transformers model after `add_adapter`; either may stand inside another module.
    """
    from peft import PeftModel

    if hasattr(model, "peft_config"):
        return "", model
    for name, module in model.named_modules():
        if isinstance(module, PeftModel) or getattr(module, "_hf_peft_config_loaded", False):
            return name, module
    return "", model


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer that is not part of the adapter, by name; they must not change."""
    # rotary layers share a buffer until a forward pass replaces it
    buffers = model.named_buffers(remove_duplicate=False)
    everything = {**dict(model.named_parameters()), **dict(buffers)}
    ours = of_adapter(model)
    return {n: t for n, t in everything.items() if not ours(n)}


def of_adapter(model: nn.Module) -> Callable[[str], bool]:
    """Whether the tensor with a given name is part of the active adapter, and saved with it.

    An inactive adapter is part of the base, because it must not change either. Outside the module that carries the
    adapter, and in a model without one, every trainable tensor counts.
    """
    learning = trainables(model)
    path, held = holder(model)
    configs, within = getattr(held, "peft_config", None), f"{path}." if path else ""
    prefix = _prefix(held)
    if prefix is None or configs is None:
        return learning.__contains__
    active = active_adapters(model)
    biases = any(getattr(c, "bias", "none") not in ("none", None) for c in configs.values())

    def ours(name: str) -> bool:
        if not name.startswith(within):
            return name in learning
        parts = name.split(".")
        for part, following in zip(parts, (*parts[1:], ""), strict=True):
            if part.startswith((prefix, *_OUTSIDE_LAYERS)):
                return following not in configs or following in active
        return biases and parts[-1] == "bias" and name in learning

    return ours


def _prefix(held: Any) -> str | None:
    """How peft begins the names of the adapter's tensors; None where they have no common prefix, or there is none."""
    from peft import PeftModel
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    if isinstance(held, PeftModel):
        return getattr(held.base_model, "prefix", None)
    config = config_of(held)
    return None if config is None else PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type)


def base_digests(model: nn.Module) -> dict[str, str]:
    """Digest of each base tensor; bitsandbytes' rearrangement of 4-bit weights on a CPU does not change it."""
    return digests((n, quantised.canonical(t)) for n, t in base_tensors(model).items())


def adapted_layers(model: nn.Module) -> list[nn.Module]:
    """The original layers under the adapters; every linear layer of the base if there are none.

    A learned prompt may come from layers of the adapter's own, which peft keeps in float32.
    """
    inner = [getattr(m, "base_layer", None) for m in model.modules()]
    wrapped: list[nn.Module] = [m for m in inner if isinstance(m, nn.Module)]
    return wrapped or [m for m in forwards.inner(model).modules() if isinstance(m, nn.Linear)]


def product_layers(model: nn.Module) -> list[nn.Module]:
    """The adapted layers whose result is a matrix product, so that its type is that of the arithmetic.

    An embedding is a lookup, in the type of its weights. A module with a parameter that peft adapts (a block of
    experts, a router) computes more after its products, and returns that.
    """
    blocks = {id(getattr(m, "base_layer", None)) for m in model.modules() if _adapts_parameter(m)}
    return [m for m in adapted_layers(model) if not isinstance(m, nn.Embedding) and id(m) not in blocks]


def other_products(model: nn.Module) -> list[nn.Module]:
    """Linear layers outside of the adapters, where these are none of LoRA's, which computes its layer's product."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapters = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    if not adapters or any(isinstance(m, LoraLayer) for m in adapters):
        return []
    inside = {id(m) for adapter in adapters for m in adapter.modules()}
    return [m for m in model.modules() if isinstance(m, nn.Linear) and id(m) not in inside]


def lora_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules with factors, by name, which is a prefix of their tensors' names."""
    return {n: m for n, m in model.named_modules() if hasattr(m, "base_layer")}


def reallocated(model: nn.Module) -> set[str]:
    """Names of the tensors that an adapter's own method rewrites between the steps.

    AdaLoRA sets elements to zero to take ranks away, and CPT bounds the norms of its rows.
    """
    parts = {n: n.split(".") for n in trainables(model)}
    return {n for n, p in parts.items() if "lora_E" in p or ("prompt_encoder" in p and "delta_embedding" in p)}


def partial_factors(model: nn.Module) -> set[str]:
    """Names of the factors in which a step may skip elements: those of all experts of a block, in one tensor."""
    blocks = [(n, m) for n, m in model.named_modules() if _adapts_parameter(m)]
    return {f"{n}.{p}" for n, m in blocks for p, _ in m.named_parameters() if not p.startswith("base_layer.")}


def _adapts_parameter(module: nn.Module) -> bool:
    return hasattr(module, "base_layer") and hasattr(module, "parameter_name")


def weights_dtypes(model: nn.Module) -> dict[str, int]:
    """Types of the adapted layers' own weights, with the number of layers."""
    weights = [getattr(layer, "weight", None) for layer in adapted_layers(model)]
    return dict(Counter(dtype_name(w.dtype) for w in weights if isinstance(w, Tensor)))


def base_differs(config: Any) -> str:
    """Why a model with the adapter of `config` disabled rightly differs from the base; empty if it must not."""
    if str(getattr(config, "init_lora_weights", "")).lower().startswith(_TAKEN_FROM_THE_BASE):
        return "the adapter starts as a part of the base's weights, which the base lacks without it"
    if getattr(config, "bias", "none") not in ("none", None):
        return "the base's own biases are trained, and stay where the adapter is disabled"
    return ""


def takes_from_the_base(fresh: nn.Module) -> bool:
    """Whether the adapter starts as a part of the base's weights, which the base loses until they are merged again."""
    init = getattr(config_of(fresh), "init_lora_weights", "")
    return str(init).lower().startswith(_TAKEN_FROM_THE_BASE)


def config_of(model: nn.Module) -> Any:
    """Configuration of the active adapter; None without one."""
    configs: Any = getattr(holder(model)[1], "peft_config", None) or {}
    return next((configs[a] for a in active_adapters(model) if a in configs), None)


def adapter_type(model: nn.Module) -> str:
    """Type of the active adapter as peft names it, such as `LORA`; empty without one."""
    named = getattr(config_of(model), "peft_type", None)
    return "" if named is None else str(getattr(named, "value", named))


def active_adapters(model: nn.Module) -> list[str]:
    """Names of the active adapters, the first of which is the one that is saved."""
    held = holder(model)[1]
    active: Any = getattr(held, "active_adapters", None) if hasattr(held, "peft_config") else None
    # a property of a PeftModel, a method of a transformers model
    if callable(active):
        active = active()
    return list(active) if isinstance(active, (list, tuple)) and active else ["default"]


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Run without the adapter, if there is one.

    Peft warns of trained biases, which `base_differs` reports.
    """
    held = holder(model)[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if hasattr(held, "disable_adapter"):
            with held.disable_adapter():
                yield
        elif hasattr(held, "peft_config"):
            held.disable_adapters()
            try:
                yield
            finally:
                held.enable_adapters()
        else:
            yield


def in_file(name: str, adapter: str = "default") -> str:
    """Name of a tensor without the parts that differ between a model and an adapter file."""
    name = name.replace(f".modules_to_save.{adapter}", "").replace(f".{adapter}", "")
    return name.replace(".base_layer.", ".").removesuffix(".weight")


@contextlib.contextmanager
def eager(model: nn.Module) -> Iterator[bool]:
    """Run with eager attention, and yield whether the model has it.

    On a CPU, sdpa turns NaN queries into zeros below 16 tokens (pytorch#141128).
    """
    inner, before = forwards.inner(model), forwards.attention_of(model)
    try:
        inner.set_attn_implementation("eager")
    # not every architecture has a choice
    except (AttributeError, ValueError, NotImplementedError):
        before = ""
    try:
        yield forwards.attention_of(model) == "eager"
    finally:
        if before:
            inner.set_attn_implementation(before)
