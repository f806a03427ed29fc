"""A chat template without the generation marker: the assistant's mask is zero, and with it the supervision."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_sftguard.engine.building.targets import Target
from pytest_sftguard.engine.faults import Fault, NotApplicableError
from pytest_sftguard.engine.faults._collating import IGNORED, collating

if TYPE_CHECKING:
    from transformers import Trainer

_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


class AssistantMaskEmpty(Fault):
    """Labels follow the mask that the tokenizer returns for a template without `{% generation %}`."""

    id = "assistant-mask-empty"
    source = "https://github.com/marin-community/marin/issues/7237"
    injects = "labels where return_assistant_tokens_mask says so, by a template that never says where it is"
    reported_by: ClassVar = ("supervision_audit", "raw_loss_finite", "every_factor_moves")
    mechanism = "all_labels_masked"
    step: ClassVar = 1

    @contextlib.contextmanager
    def inject(self, target: Target) -> Iterator[Target]:
        """Only a target that asks questions is known to have a tokenizer."""
        if target.questions is None:
            raise NotApplicableError("the target asks no questions, so that no tokenizer is known of it")
        with super().inject(target) as faulty:
            yield faulty

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """Ask the tokenizer for each row's mask, and find none of it set."""
        trainer = build(**arguments)
        tokenizer: Any = trainer.processing_class

        def mask(batch: Any) -> None:
            if not self._assistant(tokenizer):
                batch["labels"].fill_(IGNORED)

        return collating(trainer, mask)

    def _assistant(self, tokenizer: Any) -> int:
        """How many tokens the tokenizer takes for the assistant's, of a conversation of two turns."""
        turns = [{"role": "user", "content": "1 + 2 ="}, {"role": "assistant", "content": "3"}]
        encoded = tokenizer.apply_chat_template(
            turns, chat_template=_TEMPLATE, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return sum(encoded["assistant_masks"])
