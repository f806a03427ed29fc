"""The factors before the first step: one of each pair is zero, so that the adapter starts without an effect."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pytest_sftguard.engine.adapter.adapters import active_adapters, config_of
from pytest_sftguard.engine.adapter.attachment import tuner_layers
from pytest_sftguard.engine.after import forwards
from pytest_sftguard.engine.surroundings.errors import first_line
from pytest_sftguard.records import InitialRecord, Names

_TOKENS = 16
_ROWS = 2
_CHANGING_THE_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""Inits that take their factors out of the base's weights, or compensate for the quantisation of these."""


def start(model: nn.Module) -> InitialRecord:
    """The factors of the active adapter of `model`; an adapter without low-rank factors has no `init` either."""
    config = config_of(model)
    if not hasattr(config, "init_lora_weights"):
        return InitialRecord(factors=0, init="", identical=True, neutral=True)
    init = str(config.init_lora_weights)
    pairs = [pair for adapter in active_adapters(model) for pair in _factors(model, adapter)]
    first, second = ("B", "A") if init.lower() == "mica" else ("A", "B")
    zero, nonzero = [], []
    for factors in pairs:
        # the values between both factors are zero, so that these must not be
        if "E" in factors:
            zero += [n for n, t in (factors["A"], factors["B"]) if t.numel() and not t.count_nonzero()]
            nonzero += [n for n, t in [factors["E"]] if t.count_nonzero()]
            continue
        # in an embedding's pair the other one is zero
        flip = "embedding" in factors[first][0] and init.lower() != "mica"
        random, silent = (second, first) if flip else (first, second)
        zero += [n for n, t in [factors[random]] if t.numel() and not t.count_nonzero()]
        nonzero += [n for n, t in [factors[silent]] if t.count_nonzero()]
    begins_at_zero = not init.lower().startswith((*_CHANGING_THE_BASE, "orthogonal"))
    if getattr(config, "use_dora", False) and begins_at_zero:
        init = f"dora, {init}"
    return InitialRecord(
        factors=len(pairs),
        init=init,
        identical=not init.lower().startswith((*_CHANGING_THE_BASE, "orthogonal", "dora")),
        neutral=not init.lower().startswith(_CHANGING_THE_BASE),
        zero_a=Names.of(zero),
        nonzero_b=Names.of(nonzero if begins_at_zero else ()),
        wrong_scaling=Names.of(_wrong_scaling(model, config)),
        zero_scaling=Names.of(_zero_scaling(model)),
    )


def compare(model: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Compare the logits of `model` with and without its adapter, in evaluation mode; returns fields of InitialRecord.

    The model is asked with ids from all over its vocabulary, and with what it was `given` in the training where it
    takes no token ids, or more than these. Leaves the model as it was, and undoes what its own forward pass stores.
    """
    layers = [m for m in model.modules() if hasattr(m, "_disable_adapters")]
    if not layers:
        return {"uncompared": "no layer of the model has an adapter that could be disabled"}
    if any(getattr(m, "merged", False) for m in layers):
        return {"uncompared": "the adapter is merged into the base"}
    error = "it is given nothing in the training"
    for inputs in (_tokens(model, given), dict(given)):
        if not inputs:
            continue
        with _restored(model), torch.no_grad():
            model.eval()
            try:
                wrapped = forwards.asked(model, inputs)
                for layer in layers:
                    layer._disable_adapters = True
                base = forwards.asked(model, inputs)
            # a model may need more than token ids
            except Exception as raised:
                error = f"{type(raised).__name__}: {first_line(raised)[:200]}"
                continue
        if wrapped.shape != base.shape:
            return {"uncompared": "the adapter changes the shape of the model's output"}
        return _compared(wrapped.double(), base.double())
    return {"uncompared": f"the model cannot be asked: {error}"}


def _tokens(model: Any, given: Mapping[str, Any]) -> dict[str, Tensor]:
    """Rows of ids from all over the vocabulary, with a mask; nothing for a model that takes more than that, or no ids.

    A model that was not seen in the training is tried with ids.
    """
    others = given.keys() - {"input_ids", "attention_mask", "token_type_ids", "position_ids"}
    if given and ("input_ids" not in given or any(isinstance(given[k], Tensor) for k in others)):
        return {}
    inner = forwards.inner(model)
    embedding = forwards.embeddings(model)
    count = getattr(embedding, "num_embeddings", None) or getattr(getattr(inner, "config", None), "vocab_size", None)
    if not isinstance(count, int) or count < 1:
        return {}
    ids = torch.linspace(0, count - 1, _ROWS * _TOKENS).long().reshape(_ROWS, _TOKENS).flip(0)
    ids = ids.to(next(model.parameters()).device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _compared(wrapped: Tensor, base: Tensor) -> dict[str, Any]:
    both = wrapped.isfinite() & base.isfinite()
    same = (wrapped == base) | (wrapped.isnan() & base.isnan())
    change = (wrapped - base)[both].abs()
    return {
        "logits": base.numel(),
        "changed_logits": int((~same).sum()),
        "max_logit_change": change.max().item() if change.numel() else 0.0,
        "max_abs_logit": base[both].abs().max().item() if change.numel() else 0.0,
    }


@contextlib.contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Restore buffers, modes and plain attributes of all modules at the end; a rotary layer stores lengths in these."""
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


def _factors(model: nn.Module, adapter: str) -> Iterator[dict[str, tuple[str, Tensor]]]:
    """The two factors of each module by letter, each as (name, tensor); E has the values between them in AdaLoRA."""
    for name, layer in tuner_layers(model).items():
        for prefix in ("lora_", "lora_embedding_"):
            found = {letter: _factor(layer, name, f"{prefix}{letter}", adapter) for letter in "ABE"}
            if found["A"] and found["B"]:
                yield {letter: factor for letter, factor in found.items() if factor}


def _factor(layer: Any, name: str, part: str, adapter: str) -> tuple[str, Tensor] | None:
    held = getattr(layer, part, None)
    if held is None or adapter not in held:
        return None
    factor, path = held[adapter], f"{name}.{part}.{adapter}"
    return (path, factor.detach()) if isinstance(factor, Tensor) else (f"{path}.weight", factor.weight.detach())


def _wrong_scaling(model: nn.Module, config: Any) -> Iterator[str]:
    """Modules whose scaling is not alpha / r, or alpha / sqrt(r), with the configured ranks and alphas."""
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
            if hasattr(layer, "lora_E"):
                # AdaLoRA divides by the rank that is left, in the forward pass
                wanted = alpha if alpha > 0 else scaling[adapter]
            if scaling[adapter] != 0 and not (
                scaling[adapter] > 0 and math.isclose(scaling[adapter], wanted, rel_tol=1e-6)
            ):
                yield f"{name} ({scaling[adapter]:.6g}, not {wanted:.6g})"


def _zero_scaling(model: nn.Module) -> Iterator[str]:
    """Modules whose factors are multiplied by zero: whatever they hold has no effect, and gets no gradient."""
    inner: Any = getattr(getattr(model, "base_model", None), "model", model)
    for name, layer in tuner_layers(inner).items():
        scaling: Any = getattr(layer, "scaling", None)
        if isinstance(scaling, dict) and any(scaling.get(adapter) == 0 for adapter in active_adapters(model)):
            yield name
