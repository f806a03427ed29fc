"""Targets: the code under test, found by its dotted path and checked against the contract in docs/targets.md."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_sftguard import registry

if TYPE_CHECKING:
    from transformers import Trainer


class TargetError(Exception):
    """A target that breaks the contract; the message says how, and what to write instead."""


@dataclass(frozen=True)
class Target:
    """A function that builds a ready Trainer, and what else its module offers."""

    path: str
    """Dotted path of the function."""
    build: Callable[..., Any]
    """The function: takes keyword arguments named as in `TrainingArguments`, returns a ready Trainer."""
    questions: Callable[..., Any] | None
    """Returns (prompt, expected number) pairs; None if the module has no `questions`."""
    parse_answer: Callable[[str], float | None] | None
    """Parses the number in a generated text, strictly; None if the module has no `parse_answer`."""
    answer_prefix: str
    """Text that begins every answer, such as `<answer>`; empty if the module has no `answer_prefix`."""
    generate: Callable[..., Any] | None = None
    """Answers prompts with the target's own code; None if the module has no `generate`."""

    def trainer(self, **arguments: Any) -> Trainer:
        """Call the function. Raises TargetError if it refuses the keywords or does not return a complete Trainer."""
        from peft import PeftModel
        from transformers import Trainer

        must = "It must take model, dtype and any **training_arguments by keyword"
        trainer = _call(self.build, f"target {self.path}", must, arguments)
        if not isinstance(trainer, Trainer):
            raise TargetError(f"target {self.path} returned {_described(trainer)}, not a transformers.Trainer")
        if trainer.train_dataset is None:
            raise TargetError(f"target {self.path} returned a Trainer without a train_dataset")
        wrapped = isinstance(trainer.model, PeftModel)
        if wrapped and any(isinstance(m, PeftModel) for m in trainer.model.modules() if m is not trainer.model):
            raise TargetError(
                f"target {self.path} wrapped its model twice: get_peft_model was called on a model that it had wrapped"
                " already, so that the inner adapter is in no file; call it once, or add the second adapter with"
                " model.add_adapter"
            )
        if _has_discarded_adapter(trainer.model):
            raise TargetError(
                f"target {self.path} put LoRA layers into its model and gave the Trainer the model without its adapter:"
                " get_peft_model changes the model in place, and its result is what has to be trained and saved; write"
                " model = get_peft_model(model, config)"
            )
        return trainer

    def takes(self, keyword: str) -> bool:
        """Whether the function has a parameter of its own with this name."""
        return keyword in inspect.signature(self.build).parameters

    def texts(self, model: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
        """Answers of the target's own `generate` to `prompts`. Raises TargetError unless it returns a text for each."""
        assert self.generate is not None
        arguments = {"model": model, "tokenizer": tokenizer, "prompts": list(prompts)}
        must = "It must take model, tokenizer and prompts by keyword, and return a list of texts"
        texts = _call(self.generate, f"generate of target {self.path}", must, arguments)
        if not isinstance(texts, (list, tuple)) or [type(t) for t in texts] != [str] * len(prompts):
            raise TargetError(
                f"generate of target {self.path} must return a list of {len(prompts)} texts, one for each prompt, and"
                f" returned {_described(texts)}"
            )
        return list(texts)

    def pairs(self, count: int, tokenizer: Any = None) -> list[tuple[str, float]]:
        """The first `count` questions. Raises TargetError if they are not (prompt, number) pairs.

        `questions` receives the tokenizer if it has a parameter with this name, for prompts by chat template.
        """
        if self.questions is None:
            return []
        takes_tokenizer = "tokenizer" in inspect.signature(self.questions).parameters
        asked = self.questions(tokenizer=tokenizer) if takes_tokenizer else self.questions()
        pairs = []
        for item in list(asked)[:count]:
            try:
                prompt, expected = item
                pairs.append((str(prompt), float(expected)))
            except (TypeError, ValueError):
                raise TargetError(
                    f"questions() of target {self.path} must return (prompt, number) pairs, not {_described(item)}"
                ) from None
        return pairs


def _has_discarded_adapter(model: Any) -> bool:
    """Whether peft put layers into `model` for a wrapper that is gone; transformers' `add_adapter` needs none."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    saves = any(isinstance(m, PeftModel) or getattr(m, "_hf_peft_config_loaded", False) for m in model.modules())
    return not saves and any(isinstance(m, BaseTunerLayer) for m in model.modules())


def resolve(path: str) -> Target:
    """The target at `module:function`. Raises TargetError, with the reason, if there is none."""
    try:
        build = registry.load_path(path)
    except registry.NotFoundError as error:
        raise TargetError(f"target {error}") from error
    if not callable(build):
        raise TargetError(f"target {path} is {_described(build)}, not a function that builds a Trainer")
    module = sys.modules.get(getattr(build, "__module__", None) or path.partition(":")[0])
    return Target(
        path=path,
        build=build,
        questions=getattr(module, "questions", None),
        parse_answer=getattr(module, "parse_answer", None),
        answer_prefix=getattr(module, "answer_prefix", ""),
        generate=getattr(module, "generate", None),
    )


def _wrapped_and_dropped(model: Any) -> bool:
    """Whether a model carries layers of an adapter, and nothing in it or around it knows how to save them."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    saves = any(isinstance(m, PeftModel) or getattr(m, "_hf_peft_config_loaded", False) for m in model.modules())
    return not saves and any(isinstance(m, BaseTunerLayer) for m in model.modules())


def _call(function: Callable[..., Any], name: str, must: str, arguments: dict[str, Any]) -> Any:
    """Call a target's function. Raises TargetError, which says what it `must` take, if it refuses the keywords."""
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        raise TargetError(f"{name} cannot be called: {error}. {must}") from None
    return function(**arguments)


def _described(value: object) -> str:
    return f"{str(value)[:40]!r} ({type(value).__name__})"
