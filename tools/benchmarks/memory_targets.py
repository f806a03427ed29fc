"""Trainings whose memory is predicted and measured: two models, rows of one length each."""

from __future__ import annotations

import os
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from pytest_sftguard.engine.models import tiny

TOKENS = "SFTGUARD_BENCHMARK_TOKENS"
"""Environment variable with the length of every row."""


def small(**arguments: Any) -> Trainer:
    """The built-in model, enlarged to 4 million parameters."""
    return _trainer(
        LlamaConfig(
            vocab_size=2048,
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=1024,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        **arguments,
    )


def smol(**arguments: Any) -> Trainer:
    """The shape of SmolLM2-135M with random weights, fewer layers and a third of its vocabulary: 41 million."""
    return _trainer(
        LlamaConfig(
            vocab_size=16384,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=9,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=2048,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            tie_word_embeddings=True,
        ),
        **arguments,
    )


def _trainer(config: LlamaConfig, *, model: str | None = None, dtype: str = "float32", **arguments: Any) -> Trainer:
    set_seed(0)
    base: Any = LlamaForCausalLM(config).to(getattr(torch, dtype))
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    length = int(os.environ[TOKENS])
    row = [1, *(3 + i % (config.vocab_size - 3) for i in range(length - 1))]
    return Trainer(
        model=get_peft_model(base, lora),
        args=TrainingArguments(**{"learning_rate": 1e-3} | arguments),
        train_dataset=[{"input_ids": row, "labels": row}] * 64,
        data_collator=tiny.collate,
    )
