"""A model whose embedding and head share one tensor, made of whatever model a target trains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft import LoraConfig, get_peft_model

if TYPE_CHECKING:
    from transformers import Trainer


def tied(trainer: Trainer, **lora: Any) -> Trainer:
    """`trainer` with another adapter, configured by `lora`, on its base with embedding and head tied."""
    base: Any = trainer.model.unload()
    if hasattr(base, "peft_config"):
        del base.peft_config
    base.config.tie_word_embeddings = True
    base.get_output_embeddings().weight = base.get_input_embeddings().weight
    adapted = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **lora))
    trainer.model = trainer.model_wrapped = adapted
    return trainer
