"""What was seen of the training itself: steps, log, trainable and frozen tensors, optimizer."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pytest_sftguard.records.names import NONE, Names


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One optimizer step, seen at the source."""

    step: int
    """Number of the step, from 1."""
    micro_losses: tuple[float, ...] = ()
    """Loss of each micro-batch as `compute_loss` returned it, before any filter."""
    loss: float | None = None
    """The step's loss: the sum of what `training_step` returned over the micro-batches."""
    grad_norm: float | None = None
    """Global L2 norm of the unscaled gradients, before clipping."""
    max_abs_gradient: float | None = None
    """Largest absolute entry of the unscaled gradients, before clipping."""
    nonfinite_gradients: Names = NONE
    """Trainable tensors whose gradient holds NaN or infinity."""
    missing_gradients: Names = NONE
    """Trainable tensors without a gradient."""
    zero_gradients: Names = NONE
    """Trainable tensors whose gradient is exactly zero."""
    learning_rate: float | None = None
    """Learning rate that the step used (of the first parameter group)."""
    loss_scale: float | None = None
    """Loss scale that the gradients were computed under; None without a scaler."""
    loss_scale_after: float | None = None
    """Loss scale after the scaler's update; None without a scaler."""
    changed: int | None = None
    """Number of trainable tensors that changed and hold finite numbers only."""
    unchanged: Names = NONE
    """Trainable tensors that are bit for bit what they were before the step."""
    idle: Names = NONE
    """Trainable tensors of layers that no token passed through in the step, such as those of an expert not chosen."""
    stale_gradients: Names = NONE
    """Trainable tensors that held a gradient other than zero when the step began: one that no zero_grad cleared."""
    max_change_before: float | None = None
    """Largest absolute change of a trainable element from the end of the step before to this one's gradients."""
    nonfinite_weights: Names = NONE
    """Trainable tensors that hold NaN or infinity after the step."""
    nonfinite_moments: Names = NONE
    """Optimizer states that hold NaN or infinity after the step, as `parameter:state`."""
    max_update: float | None = None
    """Largest absolute change of a trainable element in the step."""
    max_update_ratio: float | None = None
    """Largest change of an element in learning rates of its own group, less weight decay and rounding, over all
    tensors; None where the optimizer is none of Adam's kin."""
    max_update_tensor: str = ""
    """The tensor in which that was; empty where nothing changed."""
    received_grad_norm: float | None = None
    """Global L2 norm of the unscaled gradients that the optimizer was given, after clipping and all else."""
    supervised_tokens: int | None = None
    """Labels of the step that count after the shift; None where the batches hold no labels."""
    rows: str | None = None
    """Digest of the rows of the step, whatever their order, padding and cut; None where they are no token ids."""
    seconds: float | None = None
    """Wall time from the start of the first micro-batch to the end of the optimizer step."""
    peak_memory_bytes: int | None = None
    """Peak of the device allocator in the step; None on a CPU."""

    @property
    def effect(self) -> str:
        """What the step did: `applied`, `skipped_by_scaler`, `poisoned`, `no_effect`, or `unknown`.

        Decided by what happened to the tensors, never by a library's flag: accelerate reports no step as skipped
        where the optimizer is fused (accelerate#4242).
        """
        if self.nonfinite_weights or self.nonfinite_moments:
            return "poisoned"
        if self.changed is None:
            return "unknown"
        if self.changed > 0:
            return "applied"
        if self.scale_fell:
            return "skipped_by_scaler"
        return "no_effect"

    @property
    def skipped(self) -> bool:
        """Whether the loss scaler skipped the step: its gradients overflowed, and it changed nothing."""
        return self.effect == "skipped_by_scaler"

    @property
    def scale_fell(self) -> bool:
        """Whether the scaler answered this step by backing off."""
        if self.loss_scale is None or self.loss_scale_after is None:
            return False
        return self.loss_scale_after < self.loss_scale

    @property
    def gradients_finite(self) -> bool:
        """Whether every gradient of the step, and their norm, was seen and is finite."""
        return self.grad_norm is not None and math.isfinite(self.grad_norm) and not self.nonfinite_gradients


@dataclass(frozen=True, kw_only=True)
class LogRecord:
    """One line of the Trainer's own log: what the user was shown. Nothing is decided by it."""

    step: int
    """`global_step` of the line."""
    loss: float | None = None
    """Logged `loss`."""
    grad_norm: float | None = None
    """Logged `grad_norm`."""
    learning_rate: float | None = None
    """Logged `learning_rate`."""


@dataclass(frozen=True, kw_only=True)
class TensorRecord:
    """One trainable tensor over the whole run."""

    name: str
    """Name of the parameter in the model."""
    dtype: str
    """Type it is stored in at the end, a torch dtype name."""
    initial_dtype: str | None = None
    """Type it was stored in before the first step."""
    elements: int
    """Number of elements."""
    initial_norm: float | None = None
    """L2 norm before the first step; 0 for a factor that starts at zero, as `lora_B` does."""
    final_norm: float | None = None
    """L2 norm after the last step."""
    delta_norm: float | None = None
    """L2 norm of (after - before); NaN where the tensor is not finite."""
    changed_fraction: float | None = None
    """Share of the elements that are finite, and that any step changed: steps by the sign return to their start."""
    partial: bool = False
    """Whether a step may leave elements out: the factors of all experts of a block are one tensor."""
    first_gradient_norm: float | None = None
    """L2 norm of its gradient in the first step whose gradients were finite; None where there was none of either."""

    @property
    def is_low_rank(self) -> bool:
        """Whether this is a part of the adapter that peft made, rather than a copy of the base's."""
        return any(part.startswith("lora_") for part in self.name.split("."))

    @property
    def is_factor(self) -> bool:
        """Whether this is a low-rank factor of a linear layer, of which every element takes part in every product."""
        return not self.partial and any(part in ("lora_A", "lora_B") for part in self.name.split("."))


@dataclass(frozen=True, kw_only=True)
class OptimizerRecord:
    """The optimizer as it was after the run."""

    name: str
    """Class name, such as `AdamW`."""
    fused: bool = False
    """Whether it steps in one fused kernel."""
    eps: float | None = None
    """The `eps` of the first group, where it has one."""
    weight_decay: float | None = None
    """The `weight_decay` of the first group, where it has one."""
    betas: tuple[float, ...] = ()
    """Decay rates of Adam's moments, those of the group with the largest possible update; empty for another kind."""
    state_dtypes: tuple[str, ...] = ()
    """Types of its floating-point states of more than one element."""
    owns_trainables: bool | None = None
    """Whether its parameters are exactly the trainable ones."""
    lacking: Names = NONE
    """Tensors that were trainable when the training began, or are at its end, and that it does not own."""
    foreign: Names = NONE
    """Tensors of the model that it owns, that take a gradient, and that did not when the training began."""
    twice: Names = NONE
    """Tensors that it owns in more than one place."""
    idle: int = 0
    """Parameters that it owns and that no gradient reaches: frozen ones, and ones outside the model."""


@dataclass(frozen=True, kw_only=True)
class BaseRecord:
    """The tensors that must not change: every parameter and buffer that is not part of the adapter."""

    tensors: int
    """How many there are."""
    digest_before: str
    """Digest of all of them before the first step."""
    digest_after: str
    """The same after the last step."""
    changed: Names = NONE
    """Those whose bits differ."""
    rewritten: Names = NONE
    """Buffers outside the state dict that the model's own forward pass rewrites; they are not held to their start."""
    trainable: Names = NONE
    """Those that have `requires_grad`, though they are not part of the adapter."""
