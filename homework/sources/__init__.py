"""Base models that the app knows by name: one file each, which fetches the weights and converts them.

Runs when such a model is loaded. The file name is the name: `smollm2_135m.py` is `--model smollm2-135m`. Its function
`folder()` returns the folder of plain safetensors and tokenizer, made on first use in the user's cache, and raises
ModelError.
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path


class ModelError(ValueError):
    """A base model that cannot be used; the message says which and why."""


NAMES = tuple(sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__)))
"""What `--model` takes besides folders and hub ids."""


def located(name: str) -> str:
    """Return the folder of a model known by name, and any other name unchanged. Raises ModelError."""
    if name not in NAMES:
        return name
    source = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
    found: Path = source.folder()
    return str(found)
