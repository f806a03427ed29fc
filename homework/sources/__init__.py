"""Base models that the app knows by name: one file each, which says where the weights are from and puts them in place.

The file name is the name: `smollm2_135m.py` is `--model smollm2-135m`. Each has a function `folder()`, which returns
the folder of plain safetensors and tokenizer, made on first use in the user's cache, and raises ModelError.
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path


class ModelError(ValueError):
    """A base model that cannot be used; the message says which and why."""


NAMES = tuple(sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__)))
"""What `--model` takes beside a folder and a hub id."""


def located(name: str) -> str:
    """Return the folder of a model known by name; whatever else it is given comes back as it is. Raises ModelError."""
    if name not in NAMES:
        return name
    source = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
    found: Path = source.folder()
    return str(found)
