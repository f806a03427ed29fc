"""Which layers a router chooses between, told from the structure of the model alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn


def choices(name: str, modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, list[str]]]:
    """The lists that the layer `name` is in and that have a router: the path of each, and the layers to choose from.

    `modules` are those of the model by name.
    """
    parts = name.split(".")
    for end in range(1, len(parts)):
        at, rest = ".".join(parts[:end]), ".".join(parts[end + 1 :])
        held = modules.get(at)
        if isinstance(held, (nn.ModuleList, nn.ModuleDict)) and _has_router(at, modules, len(held)):
            yield at, [f"{at}.{key}.{rest}" if rest else f"{at}.{key}" for key in held._modules]


def _has_router(at: str, modules: Mapping[str, nn.Module], count: int) -> bool:
    """Whether a module beside the list `at` holds a matrix with a row for each of its elements."""
    holder, _, own = at.rpartition(".")
    beside = [m for n, m in modules[holder].named_children() if n != own]
    matrices = [p for m in beside for p in m.parameters() if p.dim() == 2]
    return count > 1 and any(len(p) == count for p in matrices)
