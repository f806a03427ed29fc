"""Prompts of a batch are padded on the right: the next token is predicted from padding."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_sftguard.engine.building.targets import Target
from pytest_sftguard.engine.faults import Fault, wrapped

if TYPE_CHECKING:
    from transformers import Trainer


class RightPaddedGeneration(Fault):
    """The tokenizer pads on the right, whatever it is told, and so does what the target's own `generate` runs."""

    id = "right-padded-generation"
    source = "https://github.com/huggingface/transformers/issues/26569"
    injects = "batches of prompts are padded on the right before they are decoded"
    reported_by: ClassVar = ("decode_batch_invariance", "answers_beat_base", "strict_answers")
    mechanism = "padded_on_the_right"
    asks = True

    @contextlib.contextmanager
    def inject(self, target: Target) -> Iterator[Target]:
        """Both ways of answering: the guard's with the Trainer's tokenizer, and the target's own."""
        faulty = wrapped(target, self.trainer)
        if target.generate is not None:
            faulty = dataclasses.replace(faulty, generate=_on_the_right(target.generate))
        yield faulty

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """A tokenizer that knows one side."""
        trainer = build(**arguments)
        tokenizer: Any = trainer.processing_class
        if tokenizer is not None and hasattr(tokenizer, "padding_side"):
            kind = type(tokenizer)

            def call(self: Any, *args: Any, **kwargs: Any) -> Any:
                if "padding_side" in kwargs:
                    kwargs["padding_side"] = "right"
                return kind.__call__(self, *args, **kwargs)

            stubborn = property(lambda self: "right", lambda self, side: None)
            tokenizer.__class__ = type(kind.__name__, (kind,), {"padding_side": stubborn, "__call__": call})
        return trainer


def _on_the_right(original: Callable[..., Any]) -> Callable[..., Any]:
    """The target's `generate`, on a model whose batches have their padding moved behind the prompts."""

    def generate(model: Any, tokenizer: Any, prompts: list[str]) -> Any:
        own = model.generate

        def moved(*args: Any, **kwargs: Any) -> Any:
            ids, mask = kwargs.get("input_ids", args[0] if args else None), kwargs.get("attention_mask")
            if ids is not None and mask is not None:
                kwargs |= {"input_ids": ids.clone(), "attention_mask": mask.clone()}
                for i, row in enumerate(mask):
                    shift = -int(row.argmax())
                    kwargs["input_ids"][i] = ids[i].roll(shift)
                    kwargs["attention_mask"][i] = row.roll(shift)
                args = ()
            return own(*args, **kwargs)

        model.generate = moved
        try:
            return original(model=model, tokenizer=tokenizer, prompts=prompts)
        finally:
            del model.generate

    return generate
