"""Rows of the training that hold one of the target's questions, and the tokens that generation starts from."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pytest_sftguard.engine.building.targets import Target
from pytest_sftguard.engine.data.rows import Row

_QUESTIONS = 1024
"""Questions that are read of a target."""


@dataclass(frozen=True)
class Question:
    """One question of a target, as generation sees it."""

    text: str
    """The decoded prompt, without special tokens."""
    expected: float
    """The right number."""
    ids: tuple[int, ...]
    """Token ids of the prompt."""
    given: tuple[int, ...]
    """Token ids that generation starts from: the prompt, and the seeded prefix of its answer."""


@dataclass(frozen=True)
class Example:
    """A row, and the question that it holds."""

    row: Row
    """The row."""
    question: Question
    """The question."""
    clear: bool
    """Whether the tokens before the first label are the question and nothing else."""
    right: bool
    """Whether the supervised tokens read as the question's answer."""


class Examples:
    """Finds the question in a row. It goes by the text: deviating tokens are what the looks are after."""

    def __init__(self, target: Target, tokenizer: Any) -> None:
        self.target, self.tokenizer = target, tokenizer
        self.questions = self._questions(target.pairs(_QUESTIONS, tokenizer))
        longest_first = sorted((q for q in self.questions if q.text), key=lambda q: -len(q.text))
        self._by_text, self._by_ids = _Beginnings(longest_first, "text"), _Beginnings(longest_first, "ids")

    @classmethod
    def of(cls, target: Target, tokenizer: Any) -> Examples | None:
        """Read the questions of `target`; None where it asks none, or `tokenizer` is none."""
        if target.questions is None or not callable(tokenizer):
            return None
        found = cls(target, tokenizer)
        return found if found.questions else None

    def example(self, row: Row) -> Example | None:
        """Return the question in `row`; None where it holds none.

        A row holds a question where it begins with the question's text or tokens, and where the answer after it is
        right, or the labels mask nothing but the question.
        """
        # tokenizers drop or add white space around a text
        text = self.text(row.ids).strip()
        masked = self.text(row.prompt).strip()
        held = {**self._by_text.of(text), **self._by_ids.of(row.ids)}
        for _, q in sorted(held.items()):
            clear = masked in (q.text, (q.text + self.target.answer_prefix).strip(), self.text(q.given).strip())
            right = self.reads_as(row.answer, q.expected)
            if clear or right or self._reads(text[len(q.text) :], q.expected):
                return Example(row, q, clear, right)
        return None

    def reads_as(self, ids: Iterable[int], expected: float) -> bool:
        """Return whether the target's parser reads the answer `ids` as the number `expected`."""
        return self._reads(self.text(ids), expected)

    def text(self, ids: Iterable[int]) -> str:
        """Decode `ids` without special tokens; ids that the tokenizer does not have are left out."""
        return str(self.tokenizer.decode(self._known(ids), skip_special_tokens=True))

    def _reads(self, text: str, expected: float) -> bool:
        parse, prefix = self.target.parse_answer, self.target.answer_prefix
        if parse is None:
            return False
        found = [parse(t) for t in dict.fromkeys((text, text.strip(), prefix + text, prefix + text.strip()))]
        numbers = [f for f in found if isinstance(f, (int, float)) and not isinstance(f, bool)]
        return any(math.isclose(n, expected, rel_tol=1e-9, abs_tol=1e-12) for n in numbers)

    def _questions(self, pairs: list[tuple[str, float]]) -> list[Question]:
        prompts = [prompt for prompt, _ in pairs]
        ids = self._tokens(prompts)
        given = self._tokens([prompt + self.target.answer_prefix for prompt in prompts])
        texts = self.tokenizer.batch_decode([self._known(i) for i in ids], skip_special_tokens=True) if ids else []
        return [
            Question(text.strip(), expected, i, g)
            for text, (_, expected), i, g in zip(texts, pairs, ids, given, strict=True)
        ]

    def _tokens(self, prompts: list[str]) -> list[tuple[int, ...]]:
        """Return the token ids of all `prompts`, from one call: one call each would take as long as training steps."""
        return [tuple(ids) for ids in self.tokenizer(prompts)["input_ids"]] if prompts else []

    def _known(self, ids: Iterable[int]) -> list[int]:
        size = len(self.tokenizer)
        return [i for i in ids if 0 <= i < size]


class _Beginnings:
    """Finds the questions that a row begins with, by one of their fields: one search per length of a question."""

    def __init__(self, questions: list[Question], field: str) -> None:
        self._places: dict[Any, list[tuple[int, Question]]] = {}
        for place, question in enumerate(questions):
            self._places.setdefault(getattr(question, field), []).append((place, question))
        self._lengths = sorted({len(beginning) for beginning in self._places})

    def of(self, whole: Any) -> dict[int, Question]:
        """Return the questions that `whole` begins with, by their places among all."""
        return {place: q for length in self._lengths for place, q in self._places.get(whole[:length], ())}
