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


def low_rank(trainer: Any) -> list[Any]:
    """The trainable tensors of a Trainer's adapter that are floating numbers."""
    return [p for p in trainer.model.parameters() if p.requires_grad and p.is_floating_point()]
