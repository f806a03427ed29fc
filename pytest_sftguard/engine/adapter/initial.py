"""The factors before the first step: one of a pair is zero, so that the adapter begins as the base."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pytest_sftguard.engine.adapter.adapters import active_adapters
from pytest_sftguard.engine.adapter.attachment import config_of, tuner_layers

_TOKENS = 16
_ROWS = 2
_OTHERWISE = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""Starts that take their factors out of the base's weights, or make up for what quantisation lost of them."""


@dataclass(frozen=True)
class Start:
    """What the factors of a model were like before anything was trained."""

    factors: int
    """Modules with a pair of factors."""
    init: str
    """What the configuration says of them."""
    zero_a: tuple[str, ...]
    """Factors that are zero, and must not be."""
    nonzero_b: tuple[str, ...]
    """Factors that are not zero, and must be, but for those out of a file."""
    wrong_scaling: tuple[str, ...]
    """Modules whose scaling is not the configuration's."""

    @property
    def identical(self) -> bool:
        """Whether nothing is added to what the base gives."""
        return not self.init.lower().startswith((*_OTHERWISE, "orthogonal", "dora"))

    @property
    def neutral(self) -> bool:
        """Whether nothing but rounding is added to what the base gives."""
        return not self.init.lower().startswith(_OTHERWISE)


@dataclass(frozen=True)
class Comparison:
    """Logits of one model with its adapter and without."""

    logits: int
    """How many there are."""
    changed: int
    """How many differ, or are finite in one alone."""
    max_change: float
    """Largest difference of two finite ones."""
    largest: float
    """Largest finite one of the base."""


def start(model: nn.Module) -> Start:
    """The factors of the active adapter of `model`; one without low-rank factors has none, and no `init`."""
    config = config_of(model)
    if not hasattr(config, "init_lora_weights"):
        return Start(0, "", (), (), ())
    init = str(config.init_lora_weights)
    pairs = [pair for adapter in active_adapters(model) for pair in _pairs(model, adapter)]
    first, second = ("B", "A") if init.lower() == "mica" else ("A", "B")
    zero, nonzero = [], []
    for factors in pairs:
        # an embedding's pair starts the other way round
        flip = "embedding" in factors[first][0] and init.lower() != "mica"
        random, silent = (second, first) if flip else (first, second)
        zero += [n for n, t in [factors[random]] if t.numel() and not t.count_nonzero()]
        nonzero += [n for n, t in [factors[silent]] if t.count_nonzero()]
    begins_at_zero = not init.lower().startswith((*_OTHERWISE, "orthogonal"))
    if getattr(config, "use_dora", False) and begins_at_zero:
        init = f"dora, {init}"
    return Start(
        len(pairs), init, tuple(zero), tuple(nonzero) if begins_at_zero else (), tuple(_wrong_scaling(model, config))
    )


def compare(model: Any) -> Comparison | str:
    """Logits of `model` with and without its adapter, in evaluation mode; the reason where it cannot be asked.

    The model is left as it was: also where its own forward pass notes something.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    embedding = inner.get_input_embeddings() if hasattr(inner, "get_input_embeddings") else None
    count = getattr(embedding, "num_embeddings", None) or getattr(getattr(inner, "config", None), "vocab_size", None)
    if not isinstance(count, int) or count < 1:
        return "the model takes no token ids"
    layers = [m for m in model.modules() if hasattr(m, "_disable_adapters")]
    if any(getattr(m, "merged", False) for m in layers):
        return "the adapter is merged into the base"
    ids = torch.linspace(0, count - 1, _ROWS * _TOKENS).long().reshape(_ROWS, _TOKENS).flip(0)
    ids = ids.to(next(model.parameters()).device)
    with undisturbed(model), torch.no_grad():
        model.eval()
        try:
            wrapped = _answer(model(input_ids=ids, attention_mask=torch.ones_like(ids)))
            for layer in layers:
                layer._disable_adapters = True
            base = _answer(model(input_ids=ids, attention_mask=torch.ones_like(ids)))
        except Exception as error:  # a model that wants more than token ids
            return f"the model cannot be asked with token ids alone: {type(error).__name__}"
    if wrapped is None or base is None or wrapped.shape != base.shape:
        return "the model gives no logits"
    return _compared(wrapped.double(), base.double())


def _compared(wrapped: Tensor, base: Tensor) -> Comparison:
    both = wrapped.isfinite() & base.isfinite()
    same = (wrapped == base) | (wrapped.isnan() & base.isnan())
    change = (wrapped - base)[both].abs()
    return Comparison(
        logits=base.numel(),
        changed=int((~same).sum()),
        max_change=change.max().item() if change.numel() else 0.0,
        largest=base[both].abs().max().item() if change.numel() else 0.0,
    )


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put buffers, modes and plain attributes of all modules back at the end: a rotary layer notes lengths, say."""
    plain = (bool, int, float, str, type(None))
    kept = [(m, {k: v for k, v in vars(m).items() if isinstance(v, plain)}, dict(m._buffers)) for m in model.modules()]
    contents = {id(b): b.clone() for _, _, held in kept for b in held.values() if b is not None}
    try:
        yield
    finally:
        for module, attributes, buffers in kept:
            vars(module).update(attributes)
            for name, buffer in buffers.items():
                module._buffers[name] = buffer
                if buffer is not None and not torch.equal(buffer, contents[id(buffer)]):
                    buffer.copy_(contents[id(buffer)])


def _answer(output: Any) -> Tensor | None:
    logits = getattr(output, "logits", None)
    if logits is None and hasattr(output, "to_tuple"):
        logits = next(iter(output.to_tuple()), None)
    return logits if isinstance(logits, Tensor) else None


def _pairs(model: nn.Module, adapter: str) -> Iterator[dict[str, tuple[str, Tensor]]]:
    """The two factors of each module, each by its letter as (name, tensor)."""
    for name, layer in tuner_layers(model).items():
        for a, b in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
            one, other = _factor(layer, a, adapter), _factor(layer, b, adapter)
            if one is not None and other is not None:
                yield {"A": _named(name, a, adapter, one), "B": _named(name, b, adapter, other)}


def _factor(layer: Any, kind: str, adapter: str) -> Any:
    held = getattr(layer, kind, None)
    return held[adapter] if held is not None and adapter in held else None


def _named(layer: str, kind: str, adapter: str, factor: Any) -> tuple[str, Tensor]:
    if isinstance(factor, Tensor):
        return f"{layer}.{kind}.{adapter}", factor.detach()
    return f"{layer}.{kind}.{adapter}.weight", factor.weight.detach()


def _wrong_scaling(model: nn.Module, config: Any) -> Iterator[str]:
    """Modules that scale otherwise than by alpha / r, or alpha / sqrt(r), by the ranks and alphas asked for."""
    from peft.utils.other import get_pattern_key

    inner: Any = getattr(getattr(model, "base_model", None), "model", model)
    configs: Any = getattr(model, "peft_config", {})
    for name, layer in tuner_layers(inner).items():
        scaling: Any = getattr(layer, "scaling", None)
        for adapter in active_adapters(model):
            if not isinstance(scaling, dict) or adapter not in scaling or config is not configs.get(adapter):
                continue
            key = name.removesuffix(".base_layer")
            ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
            rank = ranks.get(get_pattern_key(list(ranks), key), config.r)
            alpha = alphas.get(get_pattern_key(list(alphas), key), config.lora_alpha)
            wanted = alpha / (math.sqrt(rank) if config.use_rslora else rank)
            if not (scaling[adapter] > 0 and math.isclose(scaling[adapter], wanted, rel_tol=1e-6)):
                yield f"{name} ({scaling[adapter]:.6g}, not {wanted:.6g})"
