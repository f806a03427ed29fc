"""The adapter apart from its base: which tensors are which, and the adapter's way through a file."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pytest_sftguard.engine import finiteness, forwards
from pytest_sftguard.engine.tensors import digests, dtype_name
from pytest_sftguard.records import Names, RoundTripRecord

_WEIGHTS = "adapter_model.safetensors"
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


def round_trip(
    trained: nn.Module, folder: Path, fresh: Any, probe: finiteness.ProbeBatch, unused: Collection[str] = ()
) -> tuple[RoundTripRecord, nn.Module]:
    """Compare the saved adapter in `folder` with `trained`, and load it onto the base of `fresh`.

    `trained` and `fresh` are PeftModels, `fresh` as the target builds it; `probe` is a batch of model inputs;
    `unused` names tensors that no token ever reached, and that may be zero. Returns what was seen, and the reloaded
    model in evaluation mode. Raises what peft raises where the load fails.
    """
    from peft import PeftModel

    name = active_adapters(trained)[0]
    folder = _of_adapter(trained, folder)
    path = folder / _WEIGHTS
    saved = saved_tensors(trained, folder)
    expected: dict[str, Tensor] = {
        in_file(n, name): p for n, p in trained.named_parameters() if is_adapter(trained, n)
    }  # with the frozen ones: an adapter that was loaded without is_trainable is saved all the same
    expected = {n: t for n, t in expected.items() if "original_module" not in n}
    every_name = {in_file(n, name) for n, _ in trained.named_parameters(remove_duplicate=False)}  # tied ones too
    base_names = {in_file(n) for n in base_tensors(trained)}

    restored, fresh_config = takes_from_the_base(fresh), _config(fresh)
    base = fresh.merge_and_unload() if restored else fresh.unload() if hasattr(fresh, "unload") else fresh
    if hasattr(base, "peft_config"):
        del base.peft_config  # left behind by `unload`, and peft warns of it
    device = next(trained.parameters()).device
    base = base.to(device).eval()
    with torch.no_grad(), eager(base):
        inputs, raw, unpadded = probe.answers(base)
        base_logits = finiteness.attended(raw.pop(), inputs)  # logits are large: none is kept longer than needed
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reloaded = PeftModel.from_pretrained(base, str(folder)).to(device).eval()
    loaded: dict[str, Tensor] = {in_file(n, active_adapters(reloaded)[0]): p for n, p in reloaded.named_parameters()}
    never = {in_file(n, name) for n in unused}

    with torch.no_grad(), eager(trained) as one, eager(reloaded) as other:
        trained.eval()
        with _disabled(trained):
            base_change = _apart(finiteness.attended(trained(**inputs).logits, inputs), base_logits)
        after = finiteness.attended(reloaded(**inputs).logits, inputs)
        effect = _apart(after, base_logits)
        del base_logits
        before = finiteness.attended(trained(**inputs).logits, inputs)
    seen = finiteness.seen(inputs, [before, after], unpadded, one and other)
    wrong_shape = {n for n in expected if n in saved and saved[n].shape != expected[n].shape}
    return RoundTripRecord(
        file_bytes=path.stat().st_size if path.exists() else 0,
        tensors=len(saved),
        missing=Names.of(sorted((expected.keys() - saved.keys()) | wrong_shape)),
        unexpected=Names.of(sorted(saved.keys() - every_name - base_names)),
        nonfinite=Names.of(n for n, t in saved.items() if t.is_floating_point() and not t.isfinite().all()),
        zero=Names.of(n for n, t in saved.items() if ".lora_" in n and n not in never and not t.count_nonzero()),
        differing=Names.of(_differing(expected, loaded)),
        load_warnings=tuple(str(w.message)[:300] for w in caught if _tells_of_tensors(str(w.message))),
        rescaled=Names.of(_rescaled(trained, reloaded)),
        computed_otherwise=Names.of(_computed_otherwise(trained, reloaded)),
        restored=restored,
        max_abs_logit=before.float().abs().max().item(),
        max_logit_change=_apart(before, after),
        max_logit_effect=effect,
        finiteness=seen,
        max_base_change=base_change,
        base_differs=base_differs(fresh_config),
    ), reloaded


def saved_tensors(trained: nn.Module, folder: Path) -> dict[str, Tensor]:
    """What the file of the active adapter holds, by the names of `in_file`; nothing where there is no file."""
    from safetensors.torch import load_file

    path = _of_adapter(trained, folder) / _WEIGHTS
    return {in_file(n): t for n, t in load_file(path).items()} if path.exists() else {}


def _of_adapter(trained: nn.Module, folder: Path) -> Path:
    """Where peft saves the active adapter: one of another name in a folder of its own."""
    name = active_adapters(trained)[0]
    return folder if name == "default" or folder.name == name else folder / name


def _apart(one: Tensor, other: Tensor) -> float:
    """Largest absolute difference; NaN where there is one."""
    return float((one.float() - other.float()).abs_().max().item())


def _differing(expected: dict[str, Tensor], loaded: dict[str, Tensor]) -> Iterable[str]:
    for name, tensor in expected.items():
        other = loaded.get(name)
        same = other is not None and other.shape == tensor.shape
        if not (same and other is not None and _same_numbers(other.detach(), tensor.detach())):
            yield name


def _computed_otherwise(trained: nn.Module, reloaded: nn.Module) -> Iterable[str]:
    """Modules that compute by another class, or by a forward of their own, in one of the two models only.

    Within the model that peft has wrapped: around it, accelerate leaves a forward with autocast, which is over by now.
    """
    within = set(forwards.inner(trained).modules())
    for name, mine, theirs in _pairs(trained, reloaded):
        if mine in within and _way(mine) != _way(theirs):
            yield name


def _way(module: nn.Module) -> tuple[type, Any]:
    """By what a module computes. The code of a patch is the same in both models, where its closure is not."""
    own = vars(module).get("forward")
    while isinstance(own, partial):
        own = own.func
    return type(module), getattr(own, "__code__", own)


def _rescaled(trained: nn.Module, reloaded: nn.Module) -> Iterable[str]:
    """LoRA layers whose share is multiplied by another number in the reloaded model."""
    adapters = active_adapters(trained)[0], active_adapters(reloaded)[0]
    for name, *layers in _pairs(trained, reloaded):
        known = [getattr(layer, "scaling", None) for layer in layers]
        before, after = (s.get(a) if isinstance(s, dict) else None for s, a in zip(known, adapters, strict=True))
        if not (isinstance(before, (int, float)) and isinstance(after, (int, float))):
            continue
        if not math.isclose(before, after, rel_tol=1e-6):
            yield f"{name} ({before:g}, reloaded {after:g})"


def _pairs(one: nn.Module, other: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Modules of two models by the name that they have in the first, whatever the adapters are called in both."""
    mine, theirs = active_adapters(one)[0], active_adapters(other)[0]
    modules = {_nameless(name, theirs): module for name, module in other.named_modules()}
    for name, module in one.named_modules():
        same = modules.get(_nameless(name, mine))
        if same is not None:
            yield name, module, same


def _nameless(name: str, adapter: str) -> tuple[str, ...]:
    """A module's path without the name of an adapter, the place of which stays."""
    return tuple("" if part == adapter else part for part in name.split("."))


def _same_numbers(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same numbers, NaN being equal to itself; peft may load into a wider type."""
    return torch.allclose(one.double(), other.double(), rtol=0, atol=0, equal_nan=True)


def base_differs(config: Any) -> str:
    """Why a model with the adapter of `config` disabled is not the base, soundly; empty where it must be."""
    if str(getattr(config, "init_lora_weights", "")).lower().startswith(_TAKEN_FROM_THE_BASE):
        return "the adapter starts as a part of the base's weights, which the base lacks without it"
    if getattr(config, "bias", "none") not in ("none", None):
        return "the base's own biases are trained, and stay where the adapter is disabled"
    return ""


def takes_from_the_base(fresh: Any) -> bool:
    """Whether the adapter starts as a part of the base's weights, which the base loses, and gets back by merging."""
    init = getattr(_config(fresh), "init_lora_weights", "")
    return str(init).lower().startswith(_TAKEN_FROM_THE_BASE)


def _config(model: Any) -> Any:
    """The configuration of the active adapter."""
    return getattr(model, "peft_config", {}).get(active_adapters(model)[0])


@contextlib.contextmanager
def _disabled(model: Any) -> Iterator[None]:
    """Run without the adapter. Peft warns of trained biases, which `base_differs` knows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with model.disable_adapter():
            yield


def active_adapters(model: nn.Module) -> list[str]:
    """Names of the adapters that are active, the first of them the one that is saved."""
    active: Any = getattr(model, "active_adapters", None)
    return list(active) if isinstance(active, (list, tuple)) and active else ["default"]


def in_file(name: str, adapter: str = "default") -> str:
    """The name of a tensor with all that differs between a model and an adapter file taken away."""
    name = name.replace(f".modules_to_save.{adapter}", "").replace(f".{adapter}", "")
    return name.replace(".base_layer.", ".").removesuffix(".weight")


def _tells_of_tensors(message: str) -> bool:
    return any(word in message.lower() for word in ("missing", "unexpected", "mismatch", "not found in"))


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
