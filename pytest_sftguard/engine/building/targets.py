"""Targets: the code under test, found by its dotted path and held to the contract of docs/targets.md."""

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
    """A target that does not keep to the contract; the message says in a line or two how, and what to write."""


@dataclass(frozen=True)
class Target:
    """A function that builds a ready Trainer, and what its module offers beside it."""

    path: str
    """Dotted path it was found at."""
    build: Callable[..., Any]
    """The function: keyword arguments in the Trainer's words in, a ready Trainer out."""
    questions: Callable[..., Any] | None
    """Gives (prompt, expected number) pairs; None where the module has no `questions`."""
    parse_answer: Callable[[str], float | None] | None
    """Reads the number of a generated text, strictly; None where the module has no `parse_answer`."""
    answer_prefix: str
    """Text that every answer is seeded with, such as `<answer>`; empty where the module has no `answer_prefix`."""
    generate: Callable[..., Any] | None = None
    """The target's own way to answer prompts; None where the module has no `generate`."""

    def trainer(self, **arguments: Any) -> Trainer:
        """Call the function. TargetError where it refuses the keywords or returns something else than a Trainer."""
        from peft import PeftModel
        from transformers import Trainer

        try:
            inspect.signature(self.build).bind(**arguments)
        except TypeError as error:
            raise TargetError(
                f"target {self.path} cannot be called: {error}. "
                "It must take model, dtype and any **training_arguments by keyword"
            ) from None
        trainer = self.build(**arguments)
        if not isinstance(trainer, Trainer):
            raise TargetError(f"target {self.path} returned {_described(trainer)}, not a transformers.Trainer")
        if trainer.train_dataset is None:
            raise TargetError(f"target {self.path} returned a Trainer without a train_dataset")
        if not isinstance(trainer.model, PeftModel):
            raise TargetError(
                f"target {self.path} returned a Trainer whose model has no adapter: wrap it with peft.get_peft_model"
            )
        return trainer

    def texts(self, model: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
        """What the target's own `generate` answers to `prompts`. TargetError where these are not as many texts."""
        assert self.generate is not None
        given = {"model": model, "tokenizer": tokenizer, "prompts": list(prompts)}
        try:
            inspect.signature(self.generate).bind(**given)
        except TypeError as error:
            raise TargetError(
                f"generate of target {self.path} cannot be called: {error}. A function of that name in a target's"
                " module must take model, tokenizer and prompts by keyword, and give a list of texts"
            ) from None
        texts = self.generate(**given)
        if not isinstance(texts, (list, tuple)) or [type(t) for t in texts] != [str] * len(prompts):
            raise TargetError(
                f"generate of target {self.path} must give a list of {len(prompts)} texts, one for each prompt, and"
                f" gave {_described(texts)}"
            )
        return list(texts)

    def pairs(self, count: int, tokenizer: Any = None) -> list[tuple[str, float]]:
        """The first `count` questions. TargetError where they are not (prompt, number) pairs.

        `questions` is handed the tokenizer where it has a parameter of that name, for prompts by chat template.
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
                    f"questions() of target {self.path} must give (prompt, number) pairs, and gave {_described(item)}"
                ) from None
        return pairs


def resolve(path: str) -> Target:
    """The target at `module:function`; TargetError with the reason where there is none."""
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


def _described(value: object) -> str:
    return f"{str(value)[:40]!r} ({type(value).__name__})"
