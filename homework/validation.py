"""How well a model answers: greedy answers to every question, read strictly, compared with pint's numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from .task.answers import Parsed, Unparsed, is_right, read_answer
from .task.data import prompt_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 100
MAX_NEW_TOKENS = 24


class Answer(NamedTuple):
    """A question and what a model answered."""

    question: str
    text: str
    """The completion, with the prefix that it was given."""
    found: Parsed | Unparsed
    """The number of the text, or why it has none."""
    expected: float

    @property
    def right(self) -> bool:
        """Whether a number was read, and is within 5 % of the expected one."""
        return is_right(self.found, self.expected)


@dataclass(frozen=True)
class Score:
    """The outcome of a validation."""

    answers: Sequence[Answer]
    """One for each question, in their order."""

    @property
    def accuracy(self) -> float:
        """Share of all questions that were answered right."""
        return sum(answer.right for answer in self.answers) / len(self.answers)

    @property
    def answer_rate(self) -> float:
        """Share of all questions that were answered in the asked format, right or wrong."""
        return sum(isinstance(answer.found, Parsed) for answer in self.answers) / len(self.answers)

    def __str__(self) -> str:
        return f"accuracy={self.accuracy:.3f} answer_rate={self.answer_rate:.3f} on {len(self.answers)} questions"


def completions(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], *, label: str = "answering"
) -> list[str]:
    """Return the greedy completion of each prompt, in their order; batched, padded on the left.

    The special tokens are left out of the texts. On a terminal, stderr shows a progress bar named `label`.
    """
    import torch
    from tqdm import tqdm  # type: ignore[import-untyped,unused-ignore]

    encoded = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    texts = [""] * len(prompts)
    was_training = model.training
    model.eval()
    progress = tqdm(total=len(prompts), desc=label, unit="question", disable=None, leave=False)
    with torch.inference_mode(), progress as bar:
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            width = max(len(encoded[i]) for i in chosen)
            rows = [[tokenizer.pad_token_id] * (width - len(encoded[i])) + list(encoded[i]) for i in chosen]
            masks = [[0] * (width - len(encoded[i])) + [1] * len(encoded[i]) for i in chosen]
            made = model.generate(
                input_ids=torch.tensor(rows, device=model.device),
                attention_mask=torch.tensor(masks, device=model.device),
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
                use_cache=True,
                pad_token_id=tokenizer.pad_token_id,
            )
            for i, text in zip(chosen, tokenizer.batch_decode(made[:, width:], skip_special_tokens=True), strict=True):
                texts[i] = text
            bar.update(len(chosen))
    model.train(was_training)
    return texts


def validate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[tuple[str, float]],
    *,
    prefix: str = "",
    label: str = "validating",
) -> Score:
    """Ask every question of `rows`, each answer begun with `prefix`, and return the score."""
    prompts = [prompt_of(question, tokenizer) + prefix for question, _ in rows]
    texts = [prefix + text for text in completions(model, tokenizer, prompts, label=label)]
    asked = zip(rows, texts, strict=True)
    return Score([Answer(question, text, read_answer(text), expected) for (question, expected), text in asked])
