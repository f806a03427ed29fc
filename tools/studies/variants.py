"""Targets by description: `tools.studies.variants:r8_rslora_left_eager_checkpointed` is the tiny model trained so.

The words of a name, in any order: `rN` (rank), one of VARIANTS, `left` or `right` (padding), `eager` or `sdpa`,
`checkpointed`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments, set_seed

from pytest_sftguard.engine.models import tiny

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "rslora": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "use_rslora": True},
    "dora": {"target_modules": ["q_proj", "up_proj"], "use_dora": True},
    "head": {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]},
    "all": {"target_modules": "all-linear"},
    "mlp": {"target_modules": ["gate_proj", "up_proj", "down_proj"]},
    "dropout": {"target_modules": "all-linear", "lora_dropout": 0.1},
}
"""What of LoRA is used, by its word."""


def __getattr__(name: str) -> Callable[..., Trainer]:
    if name.startswith("__") or name in ("questions", "parse_answer", "answer_prefix", "generate"):
        raise AttributeError(name)
    words = name.split("_")
    rank = next(int(w[1:]) for w in words if re.fullmatch(r"r[0-9]+", w))
    variant = next(w for w in words if w in VARIANTS)
    return functools.partial(
        _build, rank, variant, "left" in words, "eager" if "eager" in words else "sdpa", "checkpointed" in words
    )


def _build(rank: int, variant: str, left: bool, attention: str, checkpointed: bool, **arguments: Any) -> Trainer:
    arguments.pop("model")
    weights = getattr(torch, arguments.pop("dtype"))
    set_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    base = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    # `.to` would round the rotary frequencies, which is a fault
    base = tiny.in_dtype(base, weights)
    given = {"lr_scheduler_type": "constant", "gradient_checkpointing": checkpointed} | arguments
    training = TrainingArguments(**given)
    set_seed(training.seed)
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, task_type="CAUSAL_LM", **VARIANTS[variant])
    return Trainer(
        model=get_peft_model(base, lora),
        args=training,
        train_dataset=tiny.rows(64),
        data_collator=_padded_left if left else tiny.collate,
    )


def _padded_left(features: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    batch = tiny.collate(features)
    for i, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        for tensor in batch.values():
            tensor[i] = tensor[i].roll(tensor.shape[1] - length)
    return batch
