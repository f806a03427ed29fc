"""Names to code: in a folder of ours the file name is the name; a dotted path loads an outsider's module."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any


class NotFoundError(LookupError):
    """A name or dotted path that leads to no usable object; the message says what to write instead."""


def names(package: str) -> list[str]:
    """The names that `package` offers: its public modules, sorted."""
    module = importlib.import_module(package)
    return sorted(m.name for m in pkgutil.iter_modules(module.__path__) if not m.name.startswith("_"))


def class_name(name: str) -> str:
    """The class that the file `name` holds: `raw_loss_finite` holds `RawLossFinite`."""
    return "".join(part.capitalize() for part in name.split("_"))


def load(name: str, package: str) -> Any:
    """The class called `name` in `package`, or the object at a dotted path `module:object`."""
    if ":" in name:
        return load_path(name)
    if name not in names(package):
        valid = ", ".join(names(package))
        raise NotFoundError(f"unknown name {name!r}: choose from {valid}, or give a path module:object")
    return getattr(importlib.import_module(f"{package}.{name}"), class_name(name))


def load_path(path: str) -> Any:
    """The object at `module:object` (`my_project.train:build_trainer`).

    Raises NotFoundError, with the reason in one line, where the path is malformed, the module does not import or has no
    such object.
    """
    module_name, colon, attribute = path.partition(":")
    if not (module_name and colon and attribute):
        raise NotFoundError(f"{path!r} is no dotted path: write module:object, as in my_project.train:build_trainer")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # an outsider's module may raise anything while it is imported
        raise NotFoundError(
            f"{path!r} does not import: {type(error).__name__}: {error}"
            " (is its folder on sys.path? pytest's `pythonpath` setting puts it there)"
        ) from error
    try:
        found: Any = module
        for part in attribute.split("."):
            found = getattr(found, part)
    except AttributeError:
        raise NotFoundError(f"{path!r}: module {module_name} has no {attribute}") from None
    return found
