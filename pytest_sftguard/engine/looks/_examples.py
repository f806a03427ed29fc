"""Rows of the training that hold one of the target's questions, and the tokens that generation is given for it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pytest_sftguard.engine.building.targets import Target
from pytest_sftguard.engine.looks._rows import Row


@dataclass(frozen=True)
class Question:
    """One question of a target, as generation sees it."""

    text: str
    """What its tokens say, without special ones."""
    expected: float
    """The number that is right."""
    ids: tuple[int, ...]
    """Tokens of the prompt."""
    given: tuple[int, ...]
    """Tokens of the prompt and the seeded prefix of its answer: what generation is given."""


@dataclass(frozen=True)
class Example:
    """A row, and the question that it holds."""

    row: Row
    """The row."""
    question: Question
    """The question."""
    clear: bool
    """Whether what stands before the first label is the question and nothing else."""
    right: bool
    """Whether what is supervised reads as the question's answer."""


class Examples:
    """Finds the question in a row, by its text and not by its tokens, which may deviate: that is what is looked for."""

    def __init__(self, target: Target, tokenizer: Any, count: int) -> None:
        self.target, self.tokenizer = target, tokenizer
        self.questions = self._questions(target.pairs(count, tokenizer))
        longest_first = sorted((q for q in self.questions if q.text), key=lambda q: -len(q.text))
        self._by_text, self._by_ids = _Beginnings(longest_first, "text"), _Beginnings(longest_first, "ids")

    def example(self, row: Row) -> Example | None:
        """The question in `row`: its text is there, and the answer after it is right or nothing else is masked."""
        text = _squeezed(self.text(row.ids))
        masked = _squeezed(self.text(row.prompt))
        held = {**self._by_text.of(text), **self._by_ids.of(row.ids)}
        for _, q in sorted(held.items()):
            clear = masked in (q.text, _squeezed(q.text + self.target.answer_prefix), self.said(q))
            right = self.reads_as(row.answer, q.expected)
            if clear or right or self._reads(text[len(q.text) :], q.expected):
                return Example(row, q, clear, right)
        return None

    def examples(self, rows: Iterable[Row]) -> list[Example]:
        """Those of `rows` that hold a question."""
        return [found for row in rows if (found := self.example(row)) is not None]

    def said(self, question: Question) -> str:
        """The text of the prompt with the seeded prefix."""
        return _squeezed(self.text(question.given))

    def reads_as(self, ids: Iterable[int], expected: float) -> bool:
        """Whether `ids` are an answer that the target's parser reads as `expected`."""
        return self._reads(self.text(ids), expected)

    def text(self, ids: Iterable[int]) -> str:
        """What `ids` say, without special tokens; ids that the tokenizer does not have are left out."""
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
            Question(_squeezed(text), expected, i, g)
            for text, (_, expected), i, g in zip(texts, pairs, ids, given, strict=True)
        ]

    def _tokens(self, prompts: list[str]) -> list[tuple[int, ...]]:
        """Token ids of all `prompts`, in one call: one for each would take as long as some training steps."""
        return [tuple(ids) for ids in self.tokenizer(prompts)["input_ids"]] if prompts else []

    def _known(self, ids: Iterable[int]) -> list[int]:
        size = len(self.tokenizer)
        return [i for i in ids if 0 <= i < size]


class _Beginnings:
    """Finds the questions that a row begins with, by one of their fields: a look for each length that there is."""

    def __init__(self, questions: list[Question], field: str) -> None:
        self._places: dict[Any, list[tuple[int, Question]]] = {}
        for place, question in enumerate(questions):
            self._places.setdefault(getattr(question, field), []).append((place, question))
        self._lengths = sorted({len(beginning) for beginning in self._places})

    def of(self, whole: Any) -> dict[int, Question]:
        """The questions that `whole` begins with, by their places among all."""
        return {place: q for length in self._lengths for place, q in self._places.get(whole[:length], ())}


def _squeezed(text: str) -> str:
    """Without the white space around: tokenizers drop or add some."""
    return text.strip()
