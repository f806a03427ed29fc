"""Targets of TRL: an SFTTrainer as it is, in health and with one thing wrong."""

from __future__ import annotations

import math
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaForCausalLM, set_seed
from trl import SFTConfig, SFTTrainer

from pytest_sftguard.engine.models import sums, tiny

CHAT = (
    "{{ '<s> ' }}{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] + ' ' }}"
    "{% else %}{% generation %}{{ m['content'] + ' </s>' }}{% endgeneration %}{% endif %}{% endfor %}"
)
questions, parse_answer = sums.questions, sums.parse_answer


def build_trainer(
    *, model: str | None = None, dtype: str = "float32", data: Dataset | None = None, **training_arguments: Any
) -> SFTTrainer:
    """Prompts and completions on the tiny base of `sums`; the adapter is TRL's to attach."""
    set_seed(0)
    base = tiny.in_dtype(LlamaForCausalLM(tiny.llama(64, 0.1)), getattr(torch, dtype))
    words = sums.tokenizer()
    pairs = [{"prompt": p + " ", "completion": str(int(n))} for p, n in sums.questions()]
    arguments = SFTConfig(**{"learning_rate": 5e-3, "max_length": None} | training_arguments)
    set_seed(arguments.seed)
    return SFTTrainer(
        model=base,
        args=arguments,
        train_dataset=Dataset.from_list(pairs) if data is None else data,
        processing_class=words,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )


def nan_in_the_adapter(**arguments: Any) -> SFTTrainer:
    """One NaN, planted before the first step."""
    trainer = build_trainer(**arguments)
    with torch.no_grad():
        next(p for n, p in trainer.model.named_parameters() if "lora_A" in n).view(-1)[0] = math.nan
    return trainer


def half_precision_adapters(**arguments: Any) -> SFTTrainer:
    """The founding bug: the adapter in the base's float16, and an AdamW that computes in its parameters' type."""
    trainer = build_trainer(**{"optim": "adamw_torch", "learning_rate": 1e-2} | arguments)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.half()
    return trainer


def chats(**arguments: Any) -> SFTTrainer:
    """Conversations of which the assistant's part alone is supervised."""
    rows = [
        {"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": str(int(n))}]}
        for p, n in sums.questions()
    ]
    tokenizer = sums.tokenizer

    def with_template() -> Any:
        words = tokenizer()
        words.chat_template = CHAT
        return words

    sums.tokenizer = with_template
    try:
        return build_trainer(**{"assistant_only_loss": True} | arguments, data=Dataset.from_list(rows))
    finally:
        sums.tokenizer = tokenizer


def empty_assistant_mask(**arguments: Any) -> SFTTrainer:
    """A mask that marks nothing as the assistant's: every label is -100."""
    words = sums.tokenizer()
    rows = [words(f"{p} {int(n)}")["input_ids"] for p, n in sums.questions()]
    data = Dataset.from_list([{"input_ids": ids, "assistant_masks": [0] * len(ids)} for ids in rows])
    return build_trainer(**arguments, data=data)
