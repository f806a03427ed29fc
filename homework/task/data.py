"""From questions to token ids: data files, the prompt, supervised rows, and padding.

Training and inference build the prompt with the same function, so at inference the model sees what it was trained on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .answers import FOUR_DIGITS, Notation, format_answer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

HERE = Path(__file__).parent
TRAIN_FILE = HERE / "train.json"
VALID_FILE = HERE / "valid.json"
IGNORED = -100
"""The label that the loss ignores."""


class DataError(ValueError):
    """A data file that cannot be used; the message names the file and, where one is at fault, the row."""


def read_rows(path: str | Path) -> list[tuple[str, float]]:
    """Return the `(question, answer)` rows of a JSON file.

    Raises DataError where the file is missing, is not JSON, is empty, or has a row that is not a pair of a non-empty
    text and a finite number.
    """
    path = Path(path)
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read the data file {path}: {error.strerror or error}") from error
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise DataError(f"the data file {path} is not JSON in UTF-8: {error}") from error
    if not isinstance(loaded, list) or not loaded:
        raise DataError(f"the data file {path} must be a JSON list of [question, answer] pairs, and not empty")
    rows = []
    for number, row in enumerate(loaded, start=1):
        if not isinstance(row, list) or len(row) != 2:
            raise DataError(f"{path}, row {number}: expected [question, answer], found {_shown(row)}")
        question, answer = row
        if not isinstance(question, str) or not question.strip():
            raise DataError(f"{path}, row {number}: the question must be a text, found {_shown(question)}")
        if isinstance(answer, bool) or not isinstance(answer, (int, float)) or not _finite(answer):
            raise DataError(f"{path}, row {number}: the answer must be a finite number, found {_shown(answer)}")
        rows.append((question, float(answer)))
    return rows


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _finite(number: int | float) -> bool:
    try:
        return math.isfinite(float(number))
    except OverflowError:
        return False


def prompt_of(question: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the prompt of a question: by the tokenizer's chat template where it has one, else question and new line.

    The text is meant for `tokenizer(prompt)` with its special tokens. Where both template and tokenizer add a BOS
    token, the template's is removed, so that there is exactly one.
    """
    if not getattr(tokenizer, "chat_template", None):
        return plain_prompt(question)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    if not isinstance(text, str):
        raise DataError("the tokenizer's chat template did not give a text")
    bos = tokenizer.bos_token
    if isinstance(bos, str) and text.startswith(bos) and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
        text = text[len(bos) :]
    return text


def plain_prompt(question: str) -> str:
    """Return the prompt for a tokenizer without a chat template, the embedded model's among them."""
    return f"{question}\n"


def encode_row(
    question: str, answer: float, tokenizer: PreTrainedTokenizerBase, notation: Notation = FOUR_DIGITS
) -> dict[str, list[int]]:
    """Return `input_ids`, `attention_mask` and `labels` of one row; only the answer and the end token are supervised.

    Labels are not shifted; the model does that. Raises DataError where a token would span the boundary of prompt and
    answer: at inference the prompt would then end in other tokens than in training.
    """
    prompt = prompt_of(question, tokenizer)
    given = list(tokenizer(prompt)["input_ids"])
    whole = list(tokenizer(prompt + format_answer(answer, notation))["input_ids"])
    if whole[-1:] != [tokenizer.eos_token_id]:
        whole.append(int(tokenizer.eos_token_id))
    if given[-1:] == [tokenizer.eos_token_id]:
        given.pop()
    if whole[: len(given)] != given:
        raise DataError(f"the tokenizer merges the end of the prompt with the answer in {question!r}")
    return {
        "input_ids": whole,
        "attention_mask": [1] * len(whole),
        "labels": [IGNORED] * len(given) + whole[len(given) :],
    }


def encode_rows(
    rows: Sequence[tuple[str, float]], tokenizer: PreTrainedTokenizerBase, notation: Notation = FOUR_DIGITS
) -> list[dict[str, list[int]]]:
    """Return every row encoded, in the order given."""
    return [encode_row(question, answer, tokenizer, notation) for question, answer in rows]


@dataclass(frozen=True)
class PadToLongest:
    """Collates rows on the right to the longest of the batch, and no further."""

    pad_token_id: int
    """What pads `input_ids`; masked, and never a label."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Return one batch of tensors."""
        import torch

        width = max(len(row["input_ids"]) for row in rows)
        fills = {"input_ids": self.pad_token_id, "attention_mask": 0, "labels": IGNORED}
        return {
            name: torch.tensor([list(row[name]) + [fill] * (width - len(row[name])) for row in rows], dtype=torch.long)
            for name, fill in fills.items()
        }
