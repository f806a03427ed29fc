"""Real float16 mixed precision on a CPU, where accelerate sets up nothing and says nothing.

`Accelerator.__init__` of accelerate 1.15 leaves out its fp16 branch on a CPU: no autocast, no GradScaler, and yet every
label reads fp16 (read in its `Accelerator.__init__`). torch itself can do both there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import Trainer


def make_real(trainer: Trainer) -> None:
    """Give a Trainer that was asked for fp16 on a CPU the autocast and the loss scaler that it lacks.

    Does nothing where fp16 was not asked for, the device is another, or a scaler is already there.
    """
    accelerator = trainer.accelerator
    if not trainer.args.fp16 or accelerator.device.type != "cpu" or accelerator.scaler is not None:
        return
    accelerator.state._mixed_precision = "fp16"  # what `mixed_precision` reads, and autocast's choice of type
    accelerator.native_amp = True
    accelerator.scaler = torch.amp.GradScaler("cpu")
