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


def preferences(*, model: str | None = None, dtype: str = "float32", **training_arguments: Any) -> Any:
    """DPO: a right answer before a wrong one."""
    from trl import DPOConfig, DPOTrainer

    rows = [{"prompt": f"{p} ", "chosen": str(int(n)), "rejected": str(int(n) + 7)} for p, n in sums.questions()]
    return _trained(DPOTrainer, DPOConfig, rows, dtype, {"max_length": 64} | training_arguments)


def judgements(*, model: str | None = None, dtype: str = "float32", **training_arguments: Any) -> Any:
    """KTO: answers that are right or wrong."""
    from trl import KTOConfig, KTOTrainer

    rows = [
        {"prompt": f"{p} ", "completion": str(int(n) + 7 * (i % 2)), "label": i % 2 == 0}
        for i, (p, n) in enumerate(sums.questions())
    ]
    return _trained(KTOTrainer, KTOConfig, rows, dtype, {"max_length": 64} | training_arguments)


def rewarded(*, model: str | None = None, dtype: str = "float32", **training_arguments: Any) -> Any:
    """GRPO: in every other generation all rewards tie, so that there is nothing to learn."""
    from trl import GRPOConfig, GRPOTrainer

    calls: list[int] = []

    def reward(completions: list[str], **kwargs: Any) -> list[float]:
        calls.append(1)
        return [1.0 if len(calls) % 2 else float(len(set(c))) for c in completions]

    rows = [{"prompt": f"{p} "} for p, _ in sums.questions()]
    defaults = {"num_generations": 2, "max_completion_length": 6, "beta": 0.0}
    return _trained(GRPOTrainer, GRPOConfig, rows, dtype, defaults | training_arguments, reward_funcs=reward)


def _trained(trainer_class: Any, config: Any, rows: Any, dtype: str, arguments: dict[str, Any], **more: Any) -> Any:
    set_seed(0)
    base = tiny.in_dtype(LlamaForCausalLM(tiny.llama(64, 0.1)), getattr(torch, dtype))
    given = config(**{"learning_rate": 1e-3} | arguments)
    set_seed(given.seed)
    return trainer_class(
        model=base,
        args=given,
        train_dataset=Dataset.from_list(rows),
        processing_class=sums.tokenizer(),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        **more,
    )
