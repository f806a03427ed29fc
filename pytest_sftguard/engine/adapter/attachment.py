"""How an adapter is attached to its base: what its configuration asks for, and what is there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from pytest_sftguard.engine.adapter.adapters import active_adapters, is_adapter, trainables
from pytest_sftguard.records import Names, WiringRecord

_HEADS = ("classifier", "score", "qa_outputs")
"""What peft adds to `modules_to_save` by itself for some tasks, whether the model has it or not."""


def wiring(model: nn.Module, optimizer: Any = None) -> WiringRecord:
    """What takes a gradient in `model`, a PeftModel; `optimizer` is the one that it was built with, if any."""
    takes = trainables(model)
    attached = set(_attached(model))
    return WiringRecord(
        trainable=len(takes),
        modules=len(attached),
        frozen=Names.of(_frozen(model, type(optimizer).__name__ == "LoraFAOptimizer")),
        strays=Names.of(n for n in takes if not is_adapter(model, n)),
        unmatched=Names.of(_unmatched(model)),
        incomplete=Names.of(n for n in _asked_for(model) if n not in attached),
        disabled=any(getattr(m, "disable_adapters", False) is True for m in tuner_layers(model).values()),
    )


def tuner_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that peft put in the place of others, by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {n: m for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)}


def config_of(model: nn.Module) -> Any:
    """The configuration of the adapter that is active; None without one."""
    configs: Any = getattr(model, "peft_config", None) or {}
    return next((configs[a] for a in active_adapters(model) if a in configs), None)


def _frozen(model: nn.Module, without_a: bool) -> Iterator[str]:
    """Tensors of the active adapters without a gradient, but for those that are so on purpose.

    Some variants freeze a factor (MiCA), LoRA-FA's optimizer all of lora_A, and of several active adapters one may be
    there to be used and not trained.
    """
    active = active_adapters(model)
    of = {n: p for n, p in model.named_parameters() if is_adapter(model, n)}
    at_rest = {a for a in active if not any(p.requires_grad for n, p in of.items() if a in n.split("."))}
    if len(at_rest) == len(active):
        at_rest = set()
    meant = set(_frozen_by_peft(model))
    for name, parameter in of.items():
        parts = name.split(".")
        if parameter.requires_grad or name in meant or at_rest.intersection(parts):
            continue
        if not (without_a and "lora_A" in parts):
            yield name


def _frozen_by_peft(model: nn.Module) -> Iterator[str]:
    for name, layer in tuner_layers(model).items():
        for adapter, weights in (getattr(layer, "frozen_peft_weight_names", None) or {}).items():
            for part in weights:
                held = dict(layer.named_parameters(prefix=name))
                yield from (n for n in held if n.startswith(f"{name}.{part}.{adapter}"))


def _asked_for(model: nn.Module) -> list[str]:
    """Modules that the active adapter's targets name, as the tuner noted them when it was attached."""
    from peft.tuners.tuners_utils import check_target_module_exists

    tuner: Any = getattr(model, "base_model", None)
    config = config_of(model)
    names = list(getattr(tuner, "targeted_module_names", ()))
    if len(getattr(model, "peft_config", {})) > 1:
        names = [n for n in names if check_target_module_exists(config, n)]
    return names


def _attached(model: nn.Module) -> Iterator[str]:
    """Modules that hold weights of an active adapter, named as in the base."""
    inner: Any = getattr(getattr(model, "base_model", None), "model", model)
    active = set(active_adapters(model))
    for name, layer in tuner_layers(inner).items():
        held: Iterable[str] = getattr(layer, "adapter_layer_names", ())
        if any(active.intersection(_keys(getattr(layer, h, None))) for h in held):
            yield name.removesuffix(".base_layer")


def _keys(thing: Any) -> list[str]:
    return list(thing.keys()) if hasattr(thing, "keys") else []


def _unmatched(model: nn.Module) -> Iterator[str]:
    """Names in the configuration of the active adapter that no module answers to."""
    config, tuner = config_of(model), getattr(model, "base_model", None)
    modules = list(getattr(tuner, "targeted_module_names", ()))
    targets = getattr(config, "target_modules", None)
    if isinstance(targets, (set, list, tuple)) and not _is_of_the_architecture(model, config, set(targets)):
        yield from (t for t in sorted(targets) if not _any_ends(modules, t) and t != "dummy-target-modules")
    parameters = list(getattr(tuner, "targeted_parameter_names", ()))
    yield from (t for t in getattr(config, "target_parameters", None) or () if not _any_ends(parameters, t))
    yield from _unsaved(model, config)


def _unsaved(model: nn.Module, config: Any) -> Iterator[str]:
    from peft.utils.other import ModulesToSaveWrapper

    saved = [n for n, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)]
    added = _HEADS if getattr(config, "task_type", None) in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS") else ()
    for target in dict.fromkeys(getattr(config, "modules_to_save", None) or ()):
        if target not in added and not any(n.endswith(target) for n in saved):
            yield target


def _is_of_the_architecture(model: nn.Module, config: Any, targets: set[str]) -> bool:
    """Whether peft filled in the targets: its table names modules that only some models of an architecture have."""
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as TABLE

    kind = getattr(getattr(model, "config", None), "model_type", None)
    return config is not None and set(TABLE.get(kind, ())) == targets


def _any_ends(names: Iterable[str], target: str) -> bool:
    return any(n == target or n.endswith(f".{target}") for n in names)
