"""Rows and questions of one tokenizer, of another, and with shifted ids."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pytest_sftguard.engine.data.examples import Examples
from pytest_sftguard.engine.data.language import language
from pytest_sftguard.engine.data.rows import Row
from pytest_sftguard.engine.models import sums
from pytest_sftguard.invariants.prompt_is_prefix import PromptIsPrefix
from pytest_sftguard.records import PromptsRecord
from pytest_sftguard.verdicts import Outcome
from tests.support.canned import healthy

CITIES = ("Oslo", "Lima", "Quito", "Cairo", "Delhi", "Seoul", "Turin", "Basel", "Porto", "Minsk")
ENGLISH = [f"How far is it from {a} to {b}? The road is {n} km long." for n, a in enumerate(CITIES) for b in CITIES]
CODE = [f"def f_{i}(x):\n    return x[{i}:] + [None] * {i}  # {c.lower()}" for i in range(40) for c in CITIES]


def bpe(corpus: list[str], seed: int = 0, words: int = 420) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer trained on `corpus`, its alphabet in an order of its own."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>", *(f"<extra_{i}>" for i in range(seed))]
    made.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=words, special_tokens=special, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def seen(tokenizer: Any, questions: list[str], rows: list[list[int]]) -> PromptsRecord:
    """What is measured of questions and rows of ids."""
    target = SimpleNamespace(pairs=lambda count, _: [(q, 1.0) for q in questions], answer_prefix="", parse_answer=None)
    made = [Row(tuple(ids), None) for ids in rows]
    return PromptsRecord(questions=len(questions), rows=0, **language(Examples(target, tokenizer), made))


def failures(record: PromptsRecord) -> list[str]:
    """The reasons for which the invariant fails."""
    found = PromptIsPrefix().check(healthy(prompts=record))
    return [f.reason for f in found if f.outcome is Outcome.FAILED]


def ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """The token ids of each text."""
    return [list(i) for i in tokenizer(texts)["input_ids"]]


HELD_OUT = [f"How far is it from {c} to Rome?" for c in CITIES]
OTHER_TASK = ["What is 17 + 25?", "A train leaves at noon. When does it arrive?", "Name a prime number above 100."]


@pytest.mark.parametrize("questions", [HELD_OUT, OTHER_TASK], ids=["held-out", "other-task"])
@pytest.mark.parametrize("corpus", [ENGLISH, CODE], ids=["english", "code"])
def test_one_tokenizer_is_one_language(questions: list[str], corpus: list[str]) -> None:
    """Held-out questions, and questions of another task and wording, do not fail."""
    tokenizer = bpe(ENGLISH + CODE)
    assert failures(seen(tokenizer, questions, ids(tokenizer, corpus))) == []


@pytest.mark.parametrize("offset", [-2, -1, 1, 2, 40])
def test_shifted_ids_are_seen(offset: int) -> None:
    """Every id of the rows is off by the same number."""
    tokenizer = bpe(ENGLISH + CODE)
    rows = [[i + offset for i in row] for row in ids(tokenizer, ENGLISH)]
    record = seen(tokenizer, HELD_OUT, rows)
    assert failures(record) == ["shifted"]
    assert record.offset == offset


@pytest.mark.parametrize("offset", [-1, 1])
def test_shifted_words_are_seen(offset: int) -> None:
    """Numbers are neighbours of numbers in a vocabulary of words, and the words between them tell."""
    tokenizer = sums.tokenizer()
    rows = [[i + offset for i in row["input_ids"]] for row in sums.rows(tokenizer)]
    record = seen(tokenizer, [q for q, _ in sums.questions()], rows)
    assert failures(record) == ["shifted"]


@pytest.mark.parametrize(
    "other", [bpe(CODE, 60), bpe(["".join(reversed(t)) for t in ENGLISH], 90)], ids=["code", "back"]
)
def test_another_tokenizers_ids_are_seen(other: Any) -> None:
    """Rows from a cache that another tokenizer filled share no pair, and are not read again as they were."""
    tokenizer = bpe(ENGLISH)
    size = len(tokenizer)
    rows = [[i for i in row if i < size] for row in ids(other, ENGLISH)]
    assert failures(seen(tokenizer, HELD_OUT, rows)) == ["other_tokenizer"]


def test_shuffled_ids_are_seen() -> None:
    """A vocabulary in another order is another tokenizer."""
    tokenizer = bpe(ENGLISH + CODE)
    order = list(range(len(tokenizer)))
    random.Random(0).shuffle(order)
    rows = [[order[i] for i in row] for row in ids(tokenizer, ENGLISH)]
    assert failures(seen(tokenizer, HELD_OUT, rows)) == ["other_tokenizer"]


def test_few_pairs_decide_nothing() -> None:
    """One short question says nothing of a language."""
    tokenizer = bpe(ENGLISH)
    assert seen(tokenizer, ["Oslo"], ids(tokenizer, CODE)).shared_pairs is None
