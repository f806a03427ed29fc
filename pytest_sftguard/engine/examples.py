"""Rows of the training that hold one of the target's questions, and the tokens that generation is given for it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pytest_sftguard.engine.rows import Row
from pytest_sftguard.engine.targets import Target


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
        self.questions = [self._question(p, n) for p, n in target.pairs(count, tokenizer)]
        self._by_length = sorted(self.questions, key=lambda q: -len(q.text))

    def example(self, row: Row) -> Example | None:
        """The question in `row`: its text is there, and the answer after it is right or nothing else is masked."""
        text = _squeezed(self.text(row.ids))
        masked = _squeezed(self.text(row.prompt))
        for q in self._by_length:
            if not q.text or not (text.startswith(q.text) or row.ids[: len(q.ids)] == q.ids):
                continue
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
        known = [i for i in ids if 0 <= i < len(self.tokenizer)]
        return str(self.tokenizer.decode(known, skip_special_tokens=True))

    def _reads(self, text: str, expected: float) -> bool:
        parse, prefix = self.target.parse_answer, self.target.answer_prefix
        if parse is None:
            return False
        found = [parse(t) for t in dict.fromkeys((text, text.strip(), prefix + text, prefix + text.strip()))]
        numbers = [f for f in found if isinstance(f, (int, float)) and not isinstance(f, bool)]
        return any(math.isclose(n, expected, rel_tol=1e-9, abs_tol=1e-12) for n in numbers)

    def _question(self, prompt: str, expected: float) -> Question:
        ids = tuple(self.tokenizer(prompt)["input_ids"])
        given = tuple(self.tokenizer(prompt + self.target.answer_prefix)["input_ids"])
        return Question(_squeezed(self.text(ids)), expected, ids, given)


def _squeezed(text: str) -> str:
    """Without the white space around: tokenizers drop or add some."""
    return text.strip()
