"""Real float16 mixed precision on a CPU, where accelerate silently sets up none.

On a CPU, `Accelerator.__init__` of accelerate 1.15 skips its fp16 branch: there is no autocast and no GradScaler, and
yet every label says fp16. torch itself supports both there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import Trainer


def make_real(trainer: Trainer) -> None:
    """Give a Trainer with fp16 on a CPU the autocast and the loss scaler that it lacks.

    Does nothing without fp16, on another device, or if there is already a scaler.
    """
    accelerator = trainer.accelerator
    if not trainer.args.fp16 or accelerator.device.type != "cpu" or accelerator.scaler is not None:
        return
    # `mixed_precision` returns this, and autocast takes its type from there
    accelerator.state._mixed_precision = "fp16"
    accelerator.native_amp = True
    accelerator.scaler = torch.amp.GradScaler("cpu")
