"""The embedded tokenizer and what the app makes of it: prompts, rows, batches."""

from __future__ import annotations

import string
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from homework.base import load_tokenizer
from homework.making.build_tokenizer import build
from homework.recipes import recipe_for
from homework.sft import questions
from homework.task.answers import format_answer
from homework.task.data import (
    IGNORED,
    TRAIN_FILE,
    VALID_FILE,
    DataError,
    PadToLongest,
    encode_row,
    encode_rows,
    prompt_of,
    read_rows,
)

PRINTABLE = st.text(alphabet=string.printable, max_size=60)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(None)


@given(text=PRINTABLE)
def test_printable_text_comes_back_as_it_went_in(tokenizer: Any, text: str) -> None:
    """Encoding and decoding lose nothing, spaces before punctuation included."""
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


@given(number=st.integers(min_value=0, max_value=10**12))
def test_digits_stand_alone(tokenizer: Any, number: int) -> None:
    """A number has one token per digit."""
    assert len(tokenizer(str(number), add_special_tokens=False)["input_ids"]) == len(str(number))


@given(question=PRINTABLE, answer=st.floats(min_value=1e-12, max_value=1e12))
def test_a_prompt_is_a_prefix_of_its_row(tokenizer: Any, question: str, answer: float) -> None:
    """No token spans the seam between prompt and answer, with and without the opened tag."""
    prompt = prompt_of(question, tokenizer)
    whole = tokenizer(prompt + format_answer(answer))["input_ids"]
    for begun in (prompt, f"{prompt}<answer>"):
        given_ids = tokenizer(begun)["input_ids"]
        assert whole[: len(given_ids)] == given_ids


def test_special_tokens_are_distinct_and_bos_is_there_once(tokenizer: Any) -> None:
    """Pad, BOS and EOS differ; a training row and a prompt at inference both have exactly one BOS."""
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3
    row = encode_row("What are 3 gallons in pints?", 24, tokenizer)
    assert row["input_ids"].count(tokenizer.bos_token_id) == 1
    assert row["input_ids"].count(tokenizer.eos_token_id) == 1
    assert tokenizer(questions()[0][0])["input_ids"].count(tokenizer.bos_token_id) == 1


def test_only_the_answer_is_supervised(tokenizer: Any) -> None:
    """In every training row the labels are the answer and the end token, unshifted, and nothing of the prompt."""
    rows = read_rows(TRAIN_FILE)
    for (question, answer), row in zip(rows, encode_rows(rows, tokenizer), strict=True):
        supervised = [label for label in row["labels"] if label != IGNORED]
        assert supervised == row["input_ids"][-len(supervised) :]
        assert tokenizer.decode(supervised) == format_answer(answer) + tokenizer.eos_token
        assert tokenizer.decode(row["input_ids"][: -len(supervised)], skip_special_tokens=True) == f"{question}\n"


def test_an_answer_is_taught_in_the_notation_of_the_recipe(tokenizer: Any) -> None:
    """The embedded model learns four digits, SmolLM2 two and an exponent."""
    for model, text in (("homework/model", "9656"), ("smollm2-135m", "9.7e3")):
        row = encode_row("Say 6 mi in meters.", 9656.064, tokenizer, recipe_for(model).notation)
        supervised = [label for label in row["labels"] if label != IGNORED]
        assert tokenizer.decode(supervised) == f"<answer>{text}</answer>{tokenizer.eos_token}"


def test_the_tokenizer_is_built_as_it_is_stored(tokenizer: Any) -> None:
    """The build script gives the stored vocabulary, of 512 to 1,024 tokens."""
    assert build().get_vocab() == tokenizer.get_vocab()
    assert 512 <= len(tokenizer) <= 1024


def test_a_batch_is_padded_to_its_longest_row_only(tokenizer: Any) -> None:
    """Ids get the pad token, masks 0 and labels -100, on the right."""
    rows = encode_rows([("What are 3 gallons in pints?", 24), ("Say 7 ml in mm**3.", 7000)], tokenizer)
    batch = PadToLongest(tokenizer.pad_token_id)(rows)
    longest = max(len(row["input_ids"]) for row in rows)
    for i, row in enumerate(rows):
        size = len(row["input_ids"])
        assert batch["input_ids"][i].tolist() == row["input_ids"] + [tokenizer.pad_token_id] * (longest - size)
        assert batch["attention_mask"][i].tolist() == [1] * size + [0] * (longest - size)
        assert batch["labels"][i].tolist() == row["labels"] + [IGNORED] * (longest - size)


def test_questions_are_the_validation_rows() -> None:
    """500 prompts, each the plain question and a new line, with its number."""
    rows = read_rows(VALID_FILE)
    assert questions() == [(f"{question}\n", answer) for question, answer in rows]


def test_a_chat_template_is_used_and_gives_one_bos() -> None:
    """Where the template writes BOS and the tokenizer adds it too, one is left."""
    tokenizer: Any = build()
    tokenizer.chat_template = "{{ bos_token }}user: {{ messages[0].content }}\nassistant:"
    prompt = prompt_of("What are 3 gallons in pints?", tokenizer)
    assert prompt == "user: What are 3 gallons in pints?\nassistant:"
    row = encode_row("What are 3 gallons in pints?", 24, tokenizer)
    assert row["input_ids"].count(tokenizer.bos_token_id) == 1


def test_a_merged_seam_is_refused() -> None:
    """A tokenizer that merges the end of the prompt with the tag cannot be trained on."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    pieces = {character: i for i, character in enumerate("\n<>/answer24?Hm")}
    core = Tokenizer(models.BPE(vocab={**pieces, "\n<": 50, "<e>": 51}, merges=[("\n", "<")]))
    merging = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<e>", pad_token="<e>")
    with pytest.raises(DataError, match="merges"):
        encode_row("Hm?", 24, merging)
