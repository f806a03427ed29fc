"""The attachment of an adapter to its base, compared with what its configuration asks for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from pytest_sftguard.engine.adapter.adapters import active_adapters, config_of, of_adapter, trainables
from pytest_sftguard.records import Names, WiringRecord

_HEADS = ("classifier", "score", "qa_outputs")
"""Names that peft adds to `modules_to_save` for some tasks, whether or not the model has them."""


def wiring(model: nn.Module, optimizer: Any = None) -> WiringRecord:
    """The trainable tensors of `model`; `optimizer` is the one that the target built, if any."""
    takes, ours = trainables(model), of_adapter(model)
    if config_of(model) is None:
        return WiringRecord(trainable=len(takes), modules=0, without_adapter=True)
    attached = set(_attached(model))
    return WiringRecord(
        trainable=len(takes),
        modules=len(attached),
        frozen=Names.of(_frozen(model, type(optimizer).__name__ == "LoraFAOptimizer")),
        strays=Names.of(n for n in takes if not ours(n)),
        unmatched=Names.of(_unmatched(model)),
        incomplete=Names.of(n for n in _asked_for(model) if n not in attached),
        disabled=any(getattr(m, "disable_adapters", False) is True for m in tuner_layers(model).values()),
    )


def tuner_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules with which peft replaced others, by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {n: m for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)}


def _frozen(model: nn.Module, without_a: bool) -> Iterator[str]:
    """Tensors of the active adapters without a gradient, but for those that are frozen on purpose.

    Some variants freeze a factor (MiCA), LoRA-FA's optimizer freezes every lora_A (`without_a`), and one of several
    active adapters may be used without being trained.
    """
    active, ours = active_adapters(model), of_adapter(model)
    parameters = {n: p for n, p in model.named_parameters() if ours(n)}
    untrained = {a for a in active if not any(p.requires_grad for n, p in parameters.items() if a in n.split("."))}
    if len(untrained) == len(active):
        untrained = set()
    on_purpose = set(_frozen_by_peft(model))
    for name, parameter in parameters.items():
        parts = name.split(".")
        if parameter.requires_grad or name in on_purpose or untrained.intersection(parts):
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
    """Modules that the active adapter's targets match, as peft listed them when it attached the adapter."""
    from peft.tuners.tuners_utils import check_target_module_exists

    tuner: Any = getattr(model, "base_model", None)
    config = config_of(model)
    names = list(getattr(tuner, "targeted_module_names", ()))
    if len(getattr(model, "peft_config", {})) > 1:
        names = [n for n in names if check_target_module_exists(config, n)]
    return names


def _attached(model: nn.Module) -> Iterator[str]:
    """Modules with weights of an active adapter, named as in the base."""
    inner: Any = getattr(getattr(model, "base_model", None), "model", model)
    active = set(active_adapters(model))
    for name, layer in tuner_layers(inner).items():
        held: Iterable[str] = getattr(layer, "adapter_layer_names", ())
        if any(active.intersection(_keys(getattr(layer, h, None))) for h in held):
            yield name.removesuffix(".base_layer")


def _keys(thing: Any) -> list[str]:
    return list(thing.keys()) if hasattr(thing, "keys") else []


def _unmatched(model: nn.Module) -> Iterator[str]:
    """Targets in the configuration of the active adapter that match no module."""
    config, tuner = config_of(model), getattr(model, "base_model", None)
    modules = [*getattr(tuner, "targeted_module_names", ()), *_saved_whole(model)]
    targets = getattr(config, "target_modules", None)
    if isinstance(targets, (set, list, tuple)) and not _is_of_the_architecture(model, config, set(targets)):
        yield from (t for t in sorted(targets) if not matches(modules, t) and t != "dummy-target-modules")
    parameters = list(getattr(tuner, "targeted_parameter_names", ()))
    yield from (t for t in getattr(config, "target_parameters", None) or () if not matches(parameters, t))
    yield from _unsaved(model, config)


def _saved_whole(model: nn.Module) -> Iterator[str]:
    """Names of the modules that are trained and saved whole, which get no factors: `all-linear` names some of them."""
    from peft.utils.other import ModulesToSaveWrapper

    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            yield from (f"{name}.{n}".rstrip(".") for n, _ in module.original_module.named_modules())


def _unsaved(model: nn.Module, config: Any) -> Iterator[str]:
    from peft.utils.other import ModulesToSaveWrapper

    saved = [n for n, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)]
    added = _HEADS if getattr(config, "task_type", None) in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS") else ()
    for target in dict.fromkeys(getattr(config, "modules_to_save", None) or ()):
        if target not in added and not any(n.endswith(target) for n in saved):
            yield target


def _is_of_the_architecture(model: nn.Module, config: Any, targets: set[str]) -> bool:
    """Whether the targets come from peft's table, which names modules that only some models of an architecture have."""
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as TABLE

    architecture = getattr(getattr(model, "config", None), "model_type", None)
    return config is not None and set(TABLE.get(architecture, ())) == targets


def matches(names: Iterable[str], target: str) -> bool:
    """Whether one of `names` is `target`, or a path that ends in it."""
    return any(n == target or n.endswith(f".{target}") for n in names)
