"""A target that learns to add: a tiny Llama, a tokenizer of words, questions and strict answers; needs no network.

After two hundred steps at its learning rate it answers its sixteen sums without a mistake, so that a fault that shows
only in answers shows here. The fault library runs on it.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments, set_seed

from pytest_sftguard.engine.models.tiny import causal_base, collate, llama

_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
_WORDS = (*_SPECIAL, "+", "=", "?", ":", "the", "sum", "of", "and", "is", *map(str, range(51)))
_SUMS = tuple((a, b) for a in (1, 4, 7, 11) for b in (2, 3, 8, 13))


def tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token per word and number, which puts `<s>` in front."""
    vocabulary = {word: i for i, word in enumerate(_WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def questions() -> list[tuple[str, float]]:
    """Return the sums that it is trained on, as (prompt, number) pairs."""
    return [(_prompt(i), float(a + b)) for i, (a, b) in enumerate(_SUMS)]


def parse_answer(text: str) -> float | None:
    """Read a text that is a whole number and nothing else."""
    match = re.fullmatch(r"\s*([0-9]+)\s*", text, re.ASCII)
    return float(match[1]) if match else None


def build_trainer(*, model: str | None = None, dtype: str = "float32", **training_arguments: Any) -> Trainer:
    """Build a ready Trainer of the tiny model, or of the causal language model at the folder or hub id `model`.

    The tiny base's weights come from a fixed seed; the adapter's and the order of the rows come from `seed`.
    """
    words = tokenizer()
    base = causal_base(model, getattr(torch, dtype), llama(64, 0.1))
    arguments = TrainingArguments(**{"learning_rate": 5e-3, "lr_scheduler_type": "linear"} | training_arguments)
    set_seed(arguments.seed)
    # the random head of the tiny model cannot be certain of anything, so that it is adapted too
    where: Any = "all-linear" if model is not None else r".*\.(\w+_proj|lm_head)|lm_head"
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=where, task_type="CAUSAL_LM")
    return Trainer(
        model=get_peft_model(base, lora),
        args=arguments,
        train_dataset=rows(words),
        eval_dataset=rows(words)[:8],
        data_collator=collate,
        processing_class=words,
    )


def rows(words: PreTrainedTokenizerFast) -> list[dict[str, list[int]]]:
    """Return the sums as rows of token ids of uneven length, in which the answer and its end are supervised."""
    made = []
    for prompt, number in questions():
        question = words(prompt)["input_ids"]
        answer = [*words(str(int(number)), add_special_tokens=False)["input_ids"], words.eos_token_id]
        made.append({"input_ids": [*question, *answer], "labels": [-100] * len(question) + answer})
    return made


def _prompt(index: int) -> str:
    """Return the prompt of a sum: every third one is longer, so that rows differ in length."""
    a, b = _SUMS[index]
    return f"the sum of {a} and {b} is :" if index % 3 == 0 else f"{a} + {b} ="
