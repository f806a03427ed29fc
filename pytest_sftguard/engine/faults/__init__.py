"""The fault library: failures of LoRA fine-tuning that people met, each a class, in one module for each area.

A fault is put around a target while `python -m pytest_sftguard faults` trains it; nothing tells the guard of it.
"""

from __future__ import annotations

import importlib

from pytest_sftguard import registry
from pytest_sftguard.engine.faults.fault import Fault, NotApplicableError

__all__ = ["Fault", "NotApplicableError", "fault_named", "load_faults"]


def load_faults() -> list[type[Fault]]:
    """Every fault in the modules of this folder, sorted by id."""
    modules = [importlib.import_module(f"{__name__}.{name}") for name in registry.names(__name__)]
    classes = [(module, c) for module in modules for c in vars(module).values() if isinstance(c, type)]
    own = [c for module, c in classes if c.__module__ == module.__name__ and issubclass(c, Fault) and c is not Fault]
    return sorted(own, key=lambda fault: fault.id)


def fault_named(name: str) -> Fault:
    """The fault with this id or with this name in underscores, or the one that the function at a dotted path makes.

    Raises registry.NotFoundError, which lists the ids.
    """
    if ":" in name:
        made: Fault = registry.load_path(name)()
        return made
    faults = {fault.id: fault for fault in load_faults()}
    try:
        return faults[name.replace("_", "-")]()
    except KeyError:
        raise registry.NotFoundError(f"unknown fault {name!r}: choose from {', '.join(faults)}") from None
