"""The engine: runs a target and observes it at the source. The only folder that imports torch, transformers, peft."""

import warnings

with warnings.catch_warnings():
    # bitsandbytes, which peft imports where it is installed, has torch import a module of its own that torch warns of
    warnings.filterwarnings("ignore", "`torch.jit.script_method` is deprecated", DeprecationWarning)
    import peft  # noqa: F401
