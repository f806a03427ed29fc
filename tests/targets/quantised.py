"""Targets with a 4-bit base, which need bitsandbytes: the sums as QLoRA trains them, sound and with one thing wrong."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)

from pytest_sftguard.engine.models import sums, tiny

_made: list[tempfile.TemporaryDirectory[str]] = []


def build_trainer(
    *, model: str | None = None, dtype: str = "float32", quantization_config: Any = None, **arguments: Any
) -> Trainer:
    """The usual recipe: a base that is quantised as asked for, and `prepare_model_for_kbit_training`."""
    wanted = {"quantization_config": quantization_config} if quantization_config else {}
    base = AutoModelForCausalLM.from_pretrained(model or _checkpoint(), dtype=dtype, **wanted)
    set_seed(arguments.get("seed", 0))
    if quantization_config:
        base = prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": False})
    words = sums.tokenizer()
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return Trainer(
        model=get_peft_model(base, lora),
        args=TrainingArguments(**{"learning_rate": 5e-3} | arguments),
        train_dataset=sums.rows(words),
        eval_dataset=sums.rows(words)[:8],
        data_collator=tiny.collate,
        processing_class=words,
    )


def always(*, model: str | None = None, dtype: str = "float32", **arguments: Any) -> Trainer:
    """A script that quantises twice over whatever it is asked for, and takes no `quantization_config`."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )
    return build_trainer(model=model, dtype=dtype, quantization_config=config, **arguments)


def never(*, model: str | None = None, dtype: str = "float32", **arguments: Any) -> Trainer:
    """A script that knows nothing of quantisation."""
    return build_trainer(model=model, dtype=dtype, **arguments)


def evaluating(*, quantization_config: Any = None, **arguments: Any) -> Trainer:
    """An evaluation at every second step: on some CPUs no gradient passes through bitsandbytes' layers after it."""
    return build_trainer(
        quantization_config=quantization_config, **arguments | {"eval_strategy": "steps", "eval_steps": 2}
    )


def evaluating_without_rearranging(*, quantization_config: Any = None, **arguments: Any) -> Trainer:
    """The same as it is sound."""
    trainer = evaluating(quantization_config=quantization_config, **arguments)
    for module in trainer.model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return trainer


def evaluating_at_the_end(*, quantization_config: Any = None, **arguments: Any) -> Trainer:
    """One evaluation after the last step, which harms no training."""
    return build_trainer(
        quantization_config=quantization_config,
        **arguments | {"eval_strategy": "steps", "eval_steps": arguments["max_steps"]},
    )


def float16_compute(*, quantization_config: Any = None, **arguments: Any) -> Trainer:
    """As many scripts have it: `bnb_4bit_compute_dtype` is float16, whatever the mode is."""
    if quantization_config:
        quantization_config.bnb_4bit_compute_dtype = torch.float16
    return build_trainer(quantization_config=quantization_config, **arguments)


def another_base_each_time(*, quantization_config: Any = None, **arguments: Any) -> Trainer:
    """A base whose 4-bit weights differ between two builds: the reloaded adapter sits on weights that it never saw."""
    trainer = build_trainer(quantization_config=quantization_config, **arguments)
    _made_before.append(len(_made_before))
    with torch.no_grad():
        for module in trainer.model.modules():
            if type(module).__name__ == "Linear4bit" and not hasattr(module, "base_layer"):
                module.weight.data[: 64 * len(_made_before)] ^= 0x11
    return trainer


_made_before: list[int] = []


def _checkpoint() -> str:
    """The folder of a tiny base, made once for the process."""
    if not _made:
        _made.append(tempfile.TemporaryDirectory(prefix="sftguard-quantised-", ignore_cleanup_errors=True))
        set_seed(0)
        LlamaForCausalLM(tiny.llama(64, 0.1)).save_pretrained(Path(_made[0].name))
    return _made[0].name
