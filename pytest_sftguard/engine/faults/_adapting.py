"""Adapting: changes to a base model and its LoRA configuration, just before peft puts the adapter on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from peft import PeftModel


@contextlib.contextmanager
def adapting(change: Callable[[Any, Any], object]) -> Iterator[None]:
    """Call `change(base, config)` before each PeftModel is made."""
    original = PeftModel.__init__

    def changed(self: Any, model: Any, peft_config: Any, *args: Any, **kwargs: Any) -> None:
        change(model, peft_config)
        original(self, model, peft_config, *args, **kwargs)

    PeftModel.__init__ = changed
    try:
        yield
    finally:
        PeftModel.__init__ = original


def without_head(base: Any, config: Any) -> list[str]:
    """Take the head out of the adapter's targets, or else peft saves the base with it; returns its module names."""
    head = base.get_output_embeddings()
    names = [n.rpartition(".")[2] for n, m in base.named_modules() if head is not None and m is head]
    if isinstance(config.target_modules, (set, list)):
        config.target_modules = set(config.target_modules) - set(names)
    # "all-linear" leaves the head out by itself
    elif names and config.target_modules != "all-linear":
        config.target_modules = rf"(?!(?:.*\.)?(?:{'|'.join(names)})$)(?:{config.target_modules})"
    return names
