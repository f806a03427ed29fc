"""From names to code: in our own folders the file name is the name; a dotted path leads to an outsider's module."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any


class NotFoundError(LookupError):
    """A name or dotted path leads to no usable object; the message says what to write instead."""


def names(package: str) -> list[str]:
    """Names of the public modules of `package`, sorted."""
    module = importlib.import_module(package)
    return sorted(m.name for m in pkgutil.iter_modules(module.__path__) if not m.name.startswith("_"))


def class_name(name: str) -> str:
    """Name of the class in the file `name`: `raw_loss_finite` holds `RawLossFinite`."""
    return "".join(part.capitalize() for part in name.split("_"))


def load(name: str, package: str) -> Any:
    """The class of the file `name` in `package`, or the object at a dotted path `module:object`.

    Raises NotFoundError, with the reason and what to write instead, where there is none.
    """
    if ":" in name:
        return load_path(name)
    if name not in names(package):
        valid = ", ".join(names(package))
        raise NotFoundError(f"unknown name {name!r}: choose from {valid}, or give a path module:object")
    return getattr(importlib.import_module(f"{package}.{name}"), class_name(name))


def load_path(path: str) -> Any:
    """The object at `module:object` (`my_project.train:build_trainer`).

    Raises NotFoundError, with the reason on one line, where the path is malformed, or the module cannot be imported or
    has no such object.
    """
    module_name, colon, attribute = path.partition(":")
    if not (module_name and colon and attribute):
        raise NotFoundError(f"{path!r} is not a dotted path: write module:object, as in my_project.train:build_trainer")
    try:
        module = importlib.import_module(module_name)
    # an outsider's module may raise anything while it is imported
    except Exception as error:
        raise NotFoundError(
            f"{path!r} cannot be imported: {type(error).__name__}: {error}"
            " (is its folder on sys.path? pytest's `pythonpath` setting puts it there)"
        ) from error
    try:
        found: Any = module
        for part in attribute.split("."):
            found = getattr(found, part)
    except AttributeError:
        raise NotFoundError(f"{path!r}: module {module_name} has no {attribute}") from None
    return found
