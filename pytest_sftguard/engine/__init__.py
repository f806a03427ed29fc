"""The engine: runs a target and observes it at the source. The only folder that imports torch, transformers, peft."""
