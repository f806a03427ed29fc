"""A small, real fine-tuning app: LoRA on a language model that learns to answer unit-conversion questions.

Run by hand, or by the guard as its target. `sft` is the face and the command; the folders hold the task, the fast
training, base models known by name, and the programs that made the embedded one.
"""
