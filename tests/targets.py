"""Targets for the tests: the code under test, in health and with one thing wrong."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, get_peft_model
from transformers import Trainer

from pytest_sftguard.engine.models import tiny


def half_precision_adapters(**arguments: Any) -> Trainer:
    """The founding bug: adapters in the base's float16, and AdamW that computes in the parameters' type."""
    trainer = tiny.build_trainer(**{"optim": "adamw_torch", "learning_rate": 1e-2} | arguments)
    base = trainer.model.unload()
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    return _with_model(trainer, get_peft_model(base, lora, autocast_adapter_dtype=False))


def _with_model(trainer: Trainer, model: Any) -> Trainer:
    return Trainer(
        model=model, args=trainer.args, train_dataset=trainer.train_dataset, data_collator=trainer.data_collator
    )
