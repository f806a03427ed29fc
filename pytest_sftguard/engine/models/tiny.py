"""The built-in target: a tiny Llama with random weights, LoRA on its linear layers, synthetic rows; needs no network.

It says whether this machine's stack of libraries trains soundly, and its loss falls visibly within eight steps. It has
no tokenizer and asks no questions, so that numeric answers are not evaluated.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

_PAD, _BOS, _EOS, _WORDS = 0, 1, 2, 64
_ROWS = 64


def build_trainer(*, model: str | None = None, dtype: str = "float32", **training_arguments: Any) -> Trainer:
    """Build a ready Trainer of the tiny model, or of the causal language model at the folder or hub id `model`.

    The tiny base's weights come from a fixed seed; the adapter's and the order of the rows come from `seed`.
    """
    # larger weights learn faster, and gradients of larger ones overflow in float16 under the first loss scale
    base = causal_base(model, getattr(torch, dtype), llama(32, 0.05))
    # the tiny model bears a rate at which it learns in a few steps; a pretrained one need not
    rate = 2e-2 if model is None else 1e-3
    arguments = TrainingArguments(**{"learning_rate": rate, "lr_scheduler_type": "constant"} | training_arguments)
    set_seed(arguments.seed)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    made = rows(base.config.vocab_size)
    return Trainer(model=get_peft_model(base, lora), args=arguments, train_dataset=made, data_collator=collate)


def causal_base(model: str | None, dtype: torch.dtype, config: LlamaConfig) -> Any:
    """Load the causal language model at the folder or hub id `model`; None makes one of `config`, from a fixed seed."""
    if model is not None:
        return AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    set_seed(0)
    return in_dtype(LlamaForCausalLM(config), dtype)


def in_dtype(model: Any, dtype: torch.dtype) -> Any:
    """Cast the weights of `model` to `dtype`, and leave its buffers alone, as `from_pretrained` does.

    `model.to(dtype)` would round the rotary frequencies too.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


def rows(vocabulary: int) -> list[dict[str, list[int]]]:
    """Make synthetic rows of uneven length: BOS, a few ids, and a supervised answer that says if their sum is even.

    There are two answers, so that the first steps teach which ids are answers at all.
    """
    generator = random.Random(0)
    made = []
    for _ in range(_ROWS):
        question = [generator.randrange(3, vocabulary) for _ in range(generator.randint(3, 18))]
        answer = [3 + sum(question) % 2] * generator.randint(1, 3)
        labels = [-100] * (1 + len(question)) + [*answer, _EOS]
        made.append({"input_ids": [_BOS, *question, *answer, _EOS], "labels": labels})
    return made


def collate(features: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Pad to the longest row of the batch: three tensors of shape (rows, tokens)."""
    longest = max(len(f["input_ids"]) for f in features)

    def padded(key: str, fill: int) -> torch.Tensor:
        return torch.tensor([f[key] + [fill] * (longest - len(f[key])) for f in features])

    ids = padded("input_ids", _PAD)
    mask = torch.tensor([[1] * len(f["input_ids"]) + [0] * (longest - len(f["input_ids"])) for f in features])
    return {"input_ids": ids, "attention_mask": mask, "labels": padded("labels", -100)}


def llama(hidden_size: int, initializer_range: float) -> LlamaConfig:
    """Configure a Llama of two layers and 64 ids, whose weights have the standard deviation `initializer_range`."""
    return LlamaConfig(
        vocab_size=_WORDS,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=_PAD,
        bos_token_id=_BOS,
        eos_token_id=_EOS,
        initializer_range=initializer_range,
        tie_word_embeddings=False,
    )
