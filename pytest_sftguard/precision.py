"""The precision modes: what each one promises, and what it asks of the Trainer and of the device."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class PrecisionMode:
    """One row of the table: a mode's name says its weights and its compute."""

    name: str
    """How the mode is written in ids and options, for example `bf16-mixed`."""
    weights_dtype: str
    """Type of the frozen base weights, a torch dtype name such as `float32`."""
    compute_dtype: str
    """Type that the matrix products of the adapted layers must have, a torch dtype name."""
    autocast: bool
    """Whether the forward pass runs under autocast."""
    scaler: bool
    """Whether gradients are produced under dynamic loss scaling."""
    logits_rtol: float
    """Largest change of a logit through saving and reloading, relative to the largest logit."""
    reason: str
    """Why that tolerance."""
    training_arguments: dict[str, Any] = field(default_factory=dict)
    """What the mode sets in `TrainingArguments`."""
    cuda_only: bool = False
    """Whether the mode exists on NVIDIA devices alone."""


_EXACT = "the reloaded weights are the same bits, so only a different kernel choice may show: a few ulp of float32"
_HALF = "weights round once to 8 (bfloat16) or 11 (float16) significant bits; 8 half-ulps cover one forward pass"

MODES: dict[str, PrecisionMode] = {
    mode.name: mode
    for mode in (
        PrecisionMode("fp32", "float32", "float32", False, False, 1e-6, _EXACT),
        PrecisionMode(
            "tf32", "float32", "float32", False, False, 1e-3,
            "tf32 keeps 10 mantissa bits, and the kernel may differ between batch shapes",
            {"tf32": True}, cuda_only=True,
        ),
        PrecisionMode("bf16-mixed", "float32", "bfloat16", True, False, 1e-6, _EXACT, {"bf16": True}),
        PrecisionMode("fp16-mixed", "float32", "float16", True, True, 1e-6, _EXACT, {"fp16": True}),
        PrecisionMode("bf16-true", "bfloat16", "bfloat16", False, False, 1.6e-2, _HALF),
        PrecisionMode("fp16-true", "float16", "float16", False, False, 4e-3, _HALF),
    )
}  # fmt: skip
"""Every mode by its name."""


def mode_named(name: str) -> PrecisionMode:
    """The mode called `name`; a `ValueError` that lists the valid names where there is none."""
    try:
        return MODES[name]
    except (KeyError, TypeError):
        raise ValueError(f"unknown precision {name!r}: choose from {', '.join(MODES)}") from None
