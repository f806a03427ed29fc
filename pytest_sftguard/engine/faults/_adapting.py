"""Adapting otherwise than the target says: what peft is handed is changed on its way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def adapting(change: Callable[[Any, Any, dict[str, Any]], None]) -> Iterator[None]:
    """While this is active, `change(base, config, options)` may alter what each PeftModel is made of."""
    from peft import PeftModel

    original = PeftModel.__init__

    def made(self: Any, model: Any, peft_config: Any, *args: Any, **kwargs: Any) -> None:
        change(model, peft_config, kwargs)
        original(self, model, peft_config, *args, **kwargs)

    PeftModel.__init__ = made
    try:
        yield
    finally:
        PeftModel.__init__ = original


def without_head(base: Any, config: Any) -> list[str]:
    """Take the head out of the adapter's targets, which else is saved with its base; the names of its modules."""
    head = base.get_output_embeddings()
    names = [n.rpartition(".")[2] for n, m in base.named_modules() if head is not None and m is head]
    if isinstance(config.target_modules, (set, list)):
        config.target_modules = set(config.target_modules) - set(names)
    elif names and config.target_modules != "all-linear":  # which leaves the head out by itself
        config.target_modules = rf"(?!(?:.*\.)?(?:{'|'.join(names)})$)(?:{config.target_modules})"
    return names
