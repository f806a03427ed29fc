"""Records of the training itself: its optimizer steps, its log, its schedule, and its steps replayed in float32."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pytest_sftguard.records.tensors import NONE, Names


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One optimizer step, as seen at the source."""

    step: int
    """Number of the step, from 1."""
    micro_losses: tuple[float, ...] = ()
    """Loss of each micro-batch as `compute_loss` returned it, before any filter."""
    model_losses: tuple[float, ...] = ()
    """Loss of each micro-batch in the output of the model's only forward pass; empty where one has no such loss."""
    offsets: tuple[bool, ...] = ()
    """Whether each micro-batch's loss is the model's with a number added that no weight enters; empty if none is."""
    loss: float | None = None
    """Loss of the step: the sum of what `training_step` returned for its micro-batches."""
    grad_norm: float | None = None
    """Global L2 norm of the unscaled gradients, before clipping."""
    max_abs_gradient: float | None = None
    """Largest absolute element of the unscaled gradients, before clipping."""
    nonfinite_gradients: Names = NONE
    """Trainable tensors whose gradient contains NaN or infinity."""
    missing_gradients: Names = NONE
    """Trainable tensors without a gradient."""
    zero_gradients: Names = NONE
    """Trainable tensors whose gradient is exactly zero."""
    learning_rate: float | None = None
    """Learning rate of the first parameter group in this step."""
    loss_scale: float | None = None
    """Loss scale under which the gradients were computed; None without a scaler."""
    loss_scale_after: float | None = None
    """Loss scale after the scaler's update; None without a scaler."""
    changed: int | None = None
    """Number of trainable tensors that changed and are finite."""
    unchanged: Names = NONE
    """Trainable tensors whose bits did not change in the step."""
    idle: Names = NONE
    """Trainable tensors of layers that no token passed through in the step, such as an expert that was not chosen."""
    stale_gradients: Names = NONE
    """Trainable tensors that had a non-zero gradient when the step began, because no zero_grad cleared it."""
    gradients_cleared: bool = False
    """Whether an earlier micro-batch of the step gave gradients, and none was left when a later one began."""
    max_change_before: float | None = None
    """Largest absolute change of a trainable element between the end of the previous step and this step's gradients."""
    nonfinite_weights: Names = NONE
    """Trainable tensors that contain NaN or infinity after the step."""
    nonfinite_moments: Names = NONE
    """Optimizer states that contain NaN or infinity after the step, as `parameter:state`."""
    max_update: float | None = None
    """Largest absolute change of a trainable element in the step."""
    max_update_ratio: float | None = None
    """Largest change of an element over all tensors, in units of its group's learning rate and without weight decay and
    rounding; None for an optimizer outside the Adam family."""
    max_update_tensor: str = ""
    """Name of the tensor with that change; empty if nothing changed."""
    update_cosine: float | None = None
    """Cosine of the change of all weights with the gradient that the backward pass left, in the first step that moved:
    below 0 is downhill. None in all other steps."""
    uphill_cosine: float | None = None
    """The same for the tensor with the largest one; where earlier steps left momentum, that of all tensors."""
    uphill_tensor: str = ""
    """Name of that tensor."""
    update_uncompared: str = ""
    """Why there is no cosine, such as momentum of an earlier training; empty if nothing prevents it."""
    received_grad_norm: float | None = None
    """Global L2 norm of the unscaled gradients that the optimizer received, after clipping and anything else."""
    parting: float | None = None
    """How far the optimizer's gradient of one tensor is from the one of the backward pass times the factor that all
    tensors have in common, relative to its norm; the largest of all, None if that was not seen."""
    parting_tensor: str = ""
    """Name of that tensor; empty if no gradient changed but by the factor."""
    factor_mismatch: float | None = None
    """How far A times its transposed gradient is from the transposed gradient of B times B, which are equal where the
    loss knows the two factors of a LoRA layer by their product alone; relative to the largest possible norm, of the
    worst layer. None in steps without that look, or without such a layer."""
    factor_layer: str = ""
    """Name of that layer."""
    factors_bounded: bool = False
    """Whether hooks seem to bound the elements of the factors' gradients."""
    departure: float | None = None
    """How far the update of one tensor is from the update that a second optimizer of the same class gives it, relative
    to the largest change of its elements; of the worst tensor. None in steps that were not repeated."""
    departure_tensor: str = ""
    """Name of that tensor."""
    supervised_tokens: int | None = None
    """Labels of the step that count after the shift; None if the batches have no labels."""
    tied: bool = False
    """Whether the advantages of all rows were zero, so that a policy gradient has nothing to learn in the step."""
    rows: str | None = None
    """Digest of the step's rows that ignores their order, padding and batch split; None without token ids."""
    seconds: float | None = None
    """Wall time from the start of the first micro-batch to the end of the optimizer step."""
    peak_memory_bytes: int | None = None
    """Peak of the device allocator in the step; None on a CPU."""

    @property
    def effect(self) -> str:
        """What the step did: `applied`, `skipped_by_scaler`, `poisoned`, `no_effect`, or `unknown`.

        The tensors decide it, never a library's flag: accelerate does not report a skipped step if the optimizer is
        fused (accelerate#4242).
        """
        if self.nonfinite_weights or self.nonfinite_moments:
            return "poisoned"
        if self.changed is None:
            return "unknown"
        if self.changed > 0:
            return "applied"
        return "skipped_by_scaler" if self.scale_fell else "no_effect"

    @property
    def skipped(self) -> bool:
        """Whether the loss scaler skipped the step: its gradients overflowed, and it changed nothing."""
        return self.effect == "skipped_by_scaler"

    @property
    def scale_fell(self) -> bool:
        """Whether the scaler lowered the loss scale after this step."""
        before, after = self.loss_scale, self.loss_scale_after
        return before is not None and after is not None and after < before

    @property
    def gradients_finite(self) -> bool:
        """Whether every gradient of the step, and their norm, was seen and is finite."""
        return self.grad_norm is not None and math.isfinite(self.grad_norm) and not self.nonfinite_gradients


@dataclass(frozen=True, kw_only=True)
class LogRecord:
    """One line of the Trainer's own log, as the user saw it. It decides nothing."""

    step: int
    """`global_step` of the line."""
    loss: float | None = None
    """Logged `loss`."""
    grad_norm: float | None = None
    """Logged `grad_norm`."""
    learning_rate: float | None = None
    """Logged `learning_rate`."""


@dataclass(frozen=True, kw_only=True)
class FirstStepRecord:
    """The micro-batches of the first step, when every run of a target still has the same weights."""

    random: str = ""
    """Where the forward pass draws random numbers: empty for nowhere, `adapter` for dropout before the factors alone,
    `model` for anywhere else."""
    noise: str = ""
    """Function of torch that drew numbers in half precision which float32 would draw otherwise, such as `uniform_`;
    dropout drops the same in every type on a CPU."""
    sampled: bool = False
    """Whether the rows have advantages, and are answers that the model itself was sampled for."""
    micro_tokens: tuple[int, ...] = ()
    """Number of labels that count after the shift, for each micro-batch."""
    micro_token_losses: tuple[float, ...] = ()
    """Mean loss over those labels, for each micro-batch, computed from the model's logits; 0 without labels."""
    labels: int | None = None
    """Number of labels, with those at the first position of a row, which nothing predicts; None without logits."""
    token_loss: float | None = None
    """Mean loss over all labels of the step; None without logits, or if the labels are not token ids."""
    loss_dtype: str = ""
    """Type of the first loss that `compute_loss` returned, a torch dtype name; empty if it was not seen."""
    loss_class: str = ""
    """Class of transformers whose own, unchanged forward pass returned that loss; empty where other code did."""
    label_entropy: float | None = None
    """Entropy of the distribution of the step's labels, in nats: the loss of a model that knows only that."""
    model_loss: str = ""
    """Class of the model whose own forward pass computes the loss, called by the Trainer's own `compute_loss`; empty if
    other code computes it, or if that was not seen."""
    loss_undivided: bool = False
    """Whether `loss_class` makes a cross-entropy of its own, which takes the mean and no `num_items_in_batch`."""
    loss_library: str = ""
    """Package whose own `compute_loss` the Trainer has, such as transformers or trl; empty if the user has a hand in
    it, or if that was not seen."""


@dataclass(frozen=True, kw_only=True)
class EntropyRecord:
    """The cross-entropy of one step's logits with its labels, computed apart from the loss of the training."""

    step: int
    """Number of the optimizer step, from 1."""
    micro: tuple[float, ...] = ()
    """Mean over the labels that count, for each micro-batch."""
    tokens: tuple[int, ...] = ()
    """Number of those labels, for each micro-batch."""


@dataclass(frozen=True, kw_only=True)
class ScheduleRecord:
    """The learning rates that the first parameter group should have had, computed apart from the training."""

    name: str
    """Class of the scheduler."""
    rates: tuple[float, ...] = ()
    """Learning rate of each effective step, as many as the optimizer steps that were asked for."""
    unknown: str = ""
    """Why the rates cannot be computed, such as a scheduler that follows a metric; empty if they can."""


@dataclass(frozen=True, kw_only=True)
class ReplayedTensorRecord:
    """One trainable tensor after all replayed steps."""

    name: str
    """Name of the parameter in the model."""
    update_norm: float
    """L2 norm of the sum of its updates in the training."""
    replay_norm: float
    """L2 norm of the sum of its updates in the replay."""


@dataclass(frozen=True, kw_only=True)
class ReplayedStepRecord:
    """One replayed step, described by the tensor that is furthest from its replay by then."""

    step: int
    """Number of the optimizer step, from 1."""
    tensor: str
    """Name of the tensor whose updates so far differ most from the replay's, by their ratio."""
    update_norm: float
    """L2 norm of the sum of its updates so far in the training."""
    replay_norm: float
    """L2 norm of the sum of its updates so far in the replay."""


@dataclass(frozen=True, kw_only=True)
class ReplayRecord:
    """A second optimizer of the same class that received the same gradients, on float32 copies."""

    optimizer: str
    """Class of the optimizer."""
    steps: tuple[ReplayedStepRecord, ...] = ()
    """Every step in order, without those that the loss scaler skipped."""
    tensors: tuple[ReplayedTensorRecord, ...] = ()
    """Every trainable tensor that the optimizer owns."""
