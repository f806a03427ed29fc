"""The prompt of a row ends in another token than the prompt that generation is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_sftguard.engine.faults import Fault, NotApplicableError
from pytest_sftguard.engine.faults._collating import collating, insert, supervised

if TYPE_CHECKING:
    from transformers import Trainer


class PromptAnswerBoundaryMerge(Fault):
    """One more token stands between prompt and answer in training, as where a space is no part of either's token."""

    id = "prompt-answer-boundary-merge"
    source = "https://github.com/areal-project/AReaL/pull/1427"
    injects = "one more token before the answer, in training alone"
    reported_by: ClassVar = ("prompt_is_prefix", "answers_beat_base")
    mechanism = "prompt_tokens_differ"
    steps = 100
    asks = True

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """Insert a token that the tokenizer has for a space, or else the one that it has for what it does not know."""
        trainer = build(**arguments)
        tokenizer: Any = trainer.processing_class
        if not callable(tokenizer):
            raise NotApplicableError("the target has no tokenizer")
        spaces = tokenizer(" ", add_special_tokens=False)["input_ids"]
        token = spaces[0] if spaces else tokenizer.unk_token_id
        if token is None:
            raise NotApplicableError("the tokenizer has no token for a space")

        def separate(batch: Any) -> None:
            insert(batch, supervised(batch).int().argmax(1), int(token))

        return collating(trainer, separate)
