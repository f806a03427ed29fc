"""The precision modes: what each one promises, and what it requires of the Trainer and of the device."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How closely two runs of a mode agree, as shares of the compared values.

    The basis is a measurement of about 70 healthy targets with two layers on a CPU, with learning rates from 1e-6 to
    1e-2 and three seeds. The limits leave a factor of about ten for deeper models and for devices that sum in another
    order, or a factor of three if a model of 30 layers was measured as well.
    """

    loss_rtol: float
    """Loss of one batch under the same weights, with the same batch split and other threads."""
    split_loss_rtol: float
    """The same with another batch split or two processes, whose products have other sizes and round differently."""
    grad_norm_rtol: float
    """Gradient norms of half of the tensors, with the same batch split and other threads."""
    split_grad_norm_rtol: float
    """The same with another batch split or two processes."""
    fp32_loss_rtol: float
    """Loss of the first step, compared with float32's."""
    fp32_grad_norm_rtol: float
    """Gradient norms of half of the tensors, compared with float32's."""
    trajectory_rtol: float
    """Loss of a later step, compared with float32's (for float32, a resumed run's), as a share of the first loss."""
    reason: str
    """What was measured."""


@dataclass(frozen=True)
class PrecisionMode:
    """One row of the table. The name of a mode says what its weights and its computations are."""

    name: str
    """Name in ids and options, for example `bf16-mixed`."""
    weights_dtype: str
    """Type of the frozen base weights, a torch dtype name such as `float32`."""
    compute_dtype: str
    """Type of the matrix products of the adapted layers, a torch dtype name."""
    autocast: bool
    """Whether the forward pass runs under autocast."""
    scaler: bool
    """Whether gradients are computed under dynamic loss scaling."""
    logits_rtol: float
    """Largest change of a logit through saving and reloading, relative to the largest logit."""
    reason: str
    """Why this tolerance."""
    agreement: Agreement
    """How closely two runs of this mode agree."""
    training_arguments: dict[str, Any] = field(default_factory=dict)
    """`TrainingArguments` that the mode sets."""
    cuda_only: bool = False
    """Whether only NVIDIA devices have the mode."""
    quantisation: str | None = None
    """Type in which the base's linear layers are stored, such as `nf4`; None where they are not quantised."""

    @property
    def storage_dtype(self) -> str:
        """Type of the adapted layers' weights as they are stored, a torch dtype name."""
        return "uint8" if self.quantisation else self.weights_dtype


_BFLOAT16 = Agreement(
    loss_rtol=1e-3,
    split_loss_rtol=2.5e-2,
    grad_norm_rtol=5e-3,
    split_grad_norm_rtol=2.5e-2,
    fp32_loss_rtol=2e-2,
    fp32_grad_norm_rtol=5e-2,
    trajectory_rtol=0.1,
    reason="batch splits: 2e-5 and 8e-4, but 8e-3 and 9e-3 in a model of 30 layers (SmolLM2, two rows of 24 labels;"
    " 3e-3 and 2e-3 on eight rows and more); compared with float32: 8e-4 and 4e-3 in the first step, 6e-3 and 8e-3 in"
    " 30 layers, 2e-2 later on; a mean of means is 0.11 off in its gradients",
)
_FLOAT16 = Agreement(
    loss_rtol=1e-4,
    split_loss_rtol=3e-3,
    grad_norm_rtol=2e-3,
    split_grad_norm_rtol=3e-3,
    fp32_loss_rtol=5e-3,
    fp32_grad_norm_rtol=2e-2,
    trajectory_rtol=0.05,
    reason="batch splits: 8e-6 and 3e-4, and an eighth of bfloat16's in deep models, for three more bits; compared with"
    " float32: 1e-4 and 1e-3 in the first step, 3e-4 in 30 layers, 2e-3 later on (2e-2 at a learning rate of 0.1)",
)
_TF32 = replace(
    _FLOAT16,
    loss_rtol=2.5e-4,
    grad_norm_rtol=3e-3,
    reason="batch splits: 2.4e-5 and 3.3e-4 on an H200, and as in float16, which has as many bits, in deep models;"
    " compared with float32: 2e-4 and 1.2e-3 in the first step",
)
_FLOAT32 = Agreement(
    loss_rtol=1e-5,
    split_loss_rtol=1e-5,
    grad_norm_rtol=1e-4,
    split_grad_norm_rtol=1e-4,
    fp32_loss_rtol=1e-5,
    fp32_grad_norm_rtol=1e-4,
    trajectory_rtol=0.02,
    reason="batch splits: 3e-7 and 2e-6, in 30 layers as well",
)
_NF4 = replace(
    _BFLOAT16,
    reason="the products are bfloat16's, and so are the limits: batch splits of two layers on a CPU gave 8e-8 and 4e-4;"
    " no float32 cell has the rounded weights of the base, so that none is a reference",
)
_EXACT = "the reloaded weights are the same bits, so only a different kernel choice may show: a few ulp of float32"
_HALF = "weights round once to 8 (bfloat16) or 11 (float16) significant bits; 8 half-ulps cover one forward pass"
_FOUR_BITS = "the reloaded weights are the same four bits, and the products are bfloat16's: 8 of its half-ulps"
_TF32_KERNELS = "tf32 keeps 10 mantissa bits, and the kernel may differ between batch shapes"

MODES: dict[str, PrecisionMode] = {
    mode.name: mode
    for mode in (
        PrecisionMode("fp32", "float32", "float32", False, False, 1e-6, _EXACT, _FLOAT32),
        PrecisionMode(
            "tf32", "float32", "float32", False, False, 1e-3, _TF32_KERNELS, _TF32, {"tf32": True}, cuda_only=True
        ),
        PrecisionMode("bf16-mixed", "float32", "bfloat16", True, False, 1e-6, _EXACT, _BFLOAT16, {"bf16": True}),
        PrecisionMode("fp16-mixed", "float32", "float16", True, True, 1e-6, _EXACT, _FLOAT16, {"fp16": True}),
        PrecisionMode("bf16-true", "bfloat16", "bfloat16", False, False, 1.6e-2, _HALF, _BFLOAT16),
        PrecisionMode("fp16-true", "float16", "float16", False, False, 4e-3, _HALF, _FLOAT16),
        PrecisionMode(
            "nf4-bf16",
            "bfloat16",
            "bfloat16",
            True,
            False,
            1.6e-2,
            _FOUR_BITS,
            _NF4,
            {"bf16": True},
            quantisation="nf4",
        ),
    )
}
"""Every mode by name."""


def mode_named(name: str) -> PrecisionMode:
    """The mode with this name. Raises ValueError, which lists the valid names, if there is none."""
    try:
        return MODES[name]
    except (KeyError, TypeError):
        raise ValueError(f"unknown precision {name!r}: choose from {', '.join(MODES)}") from None
