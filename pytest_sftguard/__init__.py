"""pytest-sftguard: judges the numbers of LoRA fine-tunings in pytest. Importing it imports neither torch nor pytest."""
