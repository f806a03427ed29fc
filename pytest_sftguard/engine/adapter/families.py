"""What an adapter reaches: the weights of each family of layers, and those that its targets name and that it misses.

A family is what has the same class and the same last name, such as `q_proj (Linear)`. No list of architectures or names
decides.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from pytest_sftguard.engine.adapter.adapters import active_adapters, config_of, holder
from pytest_sftguard.engine.adapter.attachment import tuner_layers
from pytest_sftguard.engine.after import forwards
from pytest_sftguard.records import FamilyRecord, Names

_ONE_DIGIT = re.compile(r"(\\d|\[0-9\])(?![+*{?])")


class _Weight:
    """One weight of the base, of two dimensions or more."""

    def __init__(self, module: str, parameter: str, owner: nn.Module, tensor: Tensor, adapted: bool) -> None:
        self.module, self.parameter, self.owner, self.tensor, self.adapted = module, parameter, owner, tensor, adapted
        shape = getattr(getattr(tensor, "quant_state", None), "shape", tensor.shape)
        self.elements, self.dimensions = shape.numel(), len(shape)

    @property
    def path(self) -> str:
        """The module's path, or the parameter's where it is not a module's `weight`."""
        return self.module if self.parameter == "weight" else f"{self.module}.{self.parameter}"

    @property
    def name(self) -> str:
        """The last part of the path that is no number."""
        return next((part for part in reversed(self.path.split(".")) if not part.isdigit()), self.path)

    @property
    def family(self) -> str:
        """Name and class."""
        return f"{self.name} ({type(self.owner).__name__})"


def families(model: nn.Module) -> tuple[FamilyRecord, ...]:
    """The families of the base's weights in the order of the model, with what the active adapter reaches of them.

    None in a model without an adapter.
    """
    if config_of(model) is None:
        return ()
    groups: dict[str, list[_Weight]] = {}
    for weight in _weights(model):
        groups.setdefault(weight.family, []).append(weight)
    return tuple(
        FamilyRecord(
            name=name,
            weights=len(held),
            adapted=sum(w.adapted for w in held),
            elements=sum(w.elements for w in held),
            adapted_elements=sum(w.elements for w in held if w.adapted),
        )
        for name, held in groups.items()
    )


def missed(model: nn.Module) -> dict[str, Names]:
    """Fields of a WiringRecord: weights that the targets of the active adapter name, and that it does not adapt.

    Where a configuration chooses layers, by `layers_to_transform`, by paths or by a regular expression, it means to.
    """
    config = config_of(model)
    targets = getattr(config, "target_modules", None)
    if config is None or getattr(config, "is_prompt_learning", False) or not targets:
        return {}
    weights = [w for w in _weights(model) if not _excluded(config, w.module)]
    if isinstance(targets, str):
        return {"beyond_one_digit": Names.of(_beyond_one_digit(targets, weights))}
    plain = {t for t in targets if "." not in t}
    return {
        "fused": Names.of(_fused(config, plain, weights) if _chooses_names(model, plain, weights) else ()),
        "left_out": Names.of(_left_out(plain, weights) if not _chooses_layers(config) else ()),
    }


def _weights(model: nn.Module) -> Iterator[_Weight]:
    held = holder(model)[1]
    inner = held.get_base_model() if hasattr(held, "get_base_model") else held
    adapted = set(_adapted(inner, set(active_adapters(model))))
    layers = tuner_layers(inner)
    own = {f"{path}.{part}" for path, layer in layers.items() for part in _factors(layer)}
    for path, owner in inner.named_modules():
        if _within(path, own):
            continue
        for name, tensor in owner.named_parameters(recurse=False):
            shape = getattr(getattr(tensor, "quant_state", None), "shape", tensor.shape)
            if len(shape) < 2 or path in layers or ".modules_to_save" in path:
                continue
            module = ".".join(p for p in path.split(".") if p not in ("base_layer", "original_module"))
            yield _Weight(module, name, owner, tensor, (module, name) in adapted)


def _within(path: str, places: set[str]) -> bool:
    """Whether `path` is one of `places`, or inside of one."""
    parts = path.split(".")
    return any(".".join(parts[:end]) in places for end in range(1, len(parts) + 1))


def _factors(layer: Any) -> list[str]:
    """Names of the parts of a layer that hold the adapter's tensors."""
    return [n for n, _ in layer.named_children() if n != "base_layer"] if hasattr(layer, "base_layer") else []


def _adapted(inner: nn.Module, active: set[str]) -> Iterator[tuple[str, str]]:
    """Modules with weights of an active adapter, or saved beside it, with the parameter that is adapted."""
    for path, layer in tuner_layers(inner).items():
        names = getattr(layer, "adapter_layer_names", ())
        if any(active.intersection(getattr(getattr(layer, n, None), "keys", tuple)()) for n in names):
            module = ".".join(p for p in path.split(".") if p != "base_layer")
            yield module, str(getattr(layer, "parameter_name", "weight"))
    for path, module in inner.named_modules():
        if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
            yield from ((path, n) for n, _ in module.original_module.named_parameters(recurse=False))


def _fused(config: Any, plain: set[str], weights: list[_Weight]) -> Iterator[str]:
    """Parameters of three dimensions with the name of a target, or with the names of two of them, as `gate_up_proj`.

    Peft matches `target_modules` with modules. Where a model has both, a target reaches its dense layers and no expert.
    """
    reached = {w.name for w in weights if w.adapted and w.parameter == "weight"}
    asked = set(getattr(config, "target_parameters", None) or ())
    for weight in weights:
        if weight.adapted or weight.dimensions != 3 or weight.parameter == "weight":
            continue
        if any(weight.path == p or weight.path.endswith(f".{p}") for p in asked):
            continue
        if weight.name in plain & reached or _joins(weight.name, plain & reached):
            yield weight.path


def _chooses_names(model: nn.Module, plain: set[str], weights: list[_Weight]) -> bool:
    """Whether the targets leave out a linear layer other than the head: peft turns `all-linear` into the names of all.

    Who asks for all linear layers need not ask for experts, which are none.
    """
    held = holder(model)[1]
    head = forwards.embeddings(held, "output")
    linear = [w for w in weights if isinstance(w.owner, nn.Linear) and w.parameter == "weight" and w.owner is not head]
    return any(w.name not in plain and not w.adapted for w in linear)


def _joins(name: str, targets: set[str]) -> bool:
    """Whether a name joins those of two targets: `gate_up_proj` those of `gate_proj` and `up_proj`."""
    first, *others = name.split("_")
    return len(others) == 2 and {f"{first}_{others[1]}", f"{others[0]}_{others[1]}"} <= targets


def _left_out(plain: set[str], weights: list[_Weight]) -> Iterator[str]:
    """Layers with the name of a target that are not adapted, while the same layers elsewhere in the model are."""
    groups: dict[tuple[str, type], list[_Weight]] = {}
    for weight in weights:
        if weight.parameter == "weight" and weight.module.rpartition(".")[2] in plain:
            groups.setdefault((_skeleton(weight.module), type(weight.owner)), []).append(weight)
    for held in groups.values():
        if any(w.adapted for w in held):
            yield from (w.path for w in held if not w.adapted)


def _beyond_one_digit(pattern: str, weights: list[_Weight]) -> Iterator[str]:
    r"""Layers from number 10 on that a regular expression with a bare `\d` misses, where it reaches all before them."""
    if not _ONE_DIGIT.search(pattern):
        return
    groups: dict[tuple[str, type], list[_Weight]] = {}
    for weight in weights:
        if weight.parameter == "weight" and len(re.findall(r"(?<=\.)\d+(?=\.)", weight.module)) == 1:
            groups.setdefault((_skeleton(weight.module), type(weight.owner)), []).append(weight)
    for held in groups.values():
        numbers = {w: int(re.findall(r"(?<=\.)\d+(?=\.)", w.module)[0]) for w in held}
        before, after = ([w for w in held if (numbers[w] < 10) == first] for first in (True, False))
        if before and all(w.adapted for w in before) and not any(w.adapted for w in after):
            yield from (w.path for w in after)


def _skeleton(path: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path)


def _chooses_layers(config: Any) -> bool:
    return getattr(config, "layers_to_transform", None) is not None


def _excluded(config: Any, module: str) -> bool:
    """Whether the configuration leaves a module out on purpose."""
    excluded = getattr(config, "exclude_modules", None)
    if not excluded:
        return False
    if isinstance(excluded, str):
        return re.fullmatch(excluded, module) is not None
    return any(module == e or module.endswith(f".{e}") for e in excluded)
