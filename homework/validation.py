"""How well a model answers: greedy answers to every question, read strictly, compared with pint's numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .task.answers import Parsed, is_right, read_answer
from .task.data import prompt_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 100
MAX_NEW_TOKENS = 24


@dataclass(frozen=True)
class Score:
    """The outcome of a validation."""

    accuracy: float
    """Share of all questions answered within 5 % of the expected number."""
    answer_rate: float
    """Share of all questions answered in the asked format, right or wrong."""
    questions: int
    """How many questions there were."""

    def __str__(self) -> str:
        return f"accuracy={self.accuracy:.3f} answer_rate={self.answer_rate:.3f}"


def answer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    label: str = "answering",
    quiet: bool = False,
) -> list[str]:
    """Return the greedy completion of each prompt, in the order given; batched, padded on the left.

    The special tokens are left out of the texts. A progress bar with `label` stands on stderr unless `quiet`.
    """
    import torch
    from tqdm import tqdm  # type: ignore[import-untyped,unused-ignore]

    encoded = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    texts = [""] * len(prompts)
    was_training = model.training
    model.eval()
    progress = tqdm(total=len(prompts), desc=label, unit="question", disable=quiet, leave=False)
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
    label: str = "validating",
    quiet: bool = False,
) -> Score:
    """Ask every question with the plain prompt, tags not begun, and return the score."""
    texts = answer(model, tokenizer, [prompt_of(question, tokenizer) for question, _ in rows], label=label, quiet=quiet)
    answers = [read_answer(text) for text in texts]
    right = sum(is_right(found, expected) for found, (_, expected) in zip(answers, rows, strict=True))
    read = sum(isinstance(found, Parsed) for found in answers)
    return Score(accuracy=right / len(rows), answer_rate=read / len(rows), questions=len(rows))
