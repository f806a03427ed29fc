"""A small, real fine-tuning app: LoRA on a language model that learns to answer unit-conversion questions."""
