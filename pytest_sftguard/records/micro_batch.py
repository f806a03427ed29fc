"""Records of one micro-batch of a fresh Trainer: its gradient, where its loss looks, and what its tokens see."""

from __future__ import annotations

from dataclasses import dataclass

from pytest_sftguard.records.tensors import NONE, Names


@dataclass(frozen=True, kw_only=True)
class DirectionRecord:
    """The derivative of the loss along one random direction in the trainable tensors."""

    tensors: str
    """The tensors that were moved, first and last."""
    error: float
    """Distance between the derivative by the gradient and by differences, relative to its usual size."""
    held_error: float | None = None
    """The same with stop-gradients held; None where `error` was too small to ask, or nothing could be held."""
    ratio: float | None = None
    """Derivative by the gradient, divided by the derivative by differences; None if that is 0."""
    step: float
    """Relative size of the step at which differences had settled."""


@dataclass(frozen=True, kw_only=True)
class DerivativeRecord:
    """The gradient of one micro-batch, compared with differences of its loss, and what hooks make of it."""

    at_step: int = 1
    """Optimizer step of the micro-batch."""
    arithmetic: str = ""
    """Type in which the loss was computed."""
    loss: float = 0.0
    """The Trainer's loss."""
    tensors: int = 0
    """Number of trainable tensors that were moved."""
    hooked: Names = NONE
    """Trainable tensors left out, because hooks of the training run once their gradient is there, or
    cannot be called by hand."""
    changed: Names = NONE
    """Trainable tensors whose gradient a hook of the training changes, other than by clipping or masking it."""
    hook: str = ""
    """The hook that changes the first of them, with file and line."""
    hook_distance: float | None = None
    """Distance between the gradient before and after it, relative to the norm before; None if there is none."""
    hook_factor: float | None = None
    """The one factor by which it multiplies the gradient; None if it does something else."""
    asked: int = 0
    """Number of directions that were tried."""
    unsettled: int = 0
    """Number of those along which no two step sizes agreed."""
    directions: tuple[DirectionRecord, ...] = ()
    """The others."""
    tensor: str = ""
    """The tensor nearest to the loss whose gradient deviates; empty if none does."""
    upstream: bool | None = None
    """Whether gradients of tensors before it deviate too; None if there are none."""
    detached: Names = NONE
    """Places in the user's code, as file and line, at which a layer stops a gradient that the loss depends on."""
    left_out: str = ""
    """Why nothing could be compared; empty if something was."""
    error: str = ""
    """The exception that ended the look; empty if none did."""


@dataclass(frozen=True, kw_only=True)
class FootprintRecord:
    """The places whose last hidden state the loss of the first micro-batch depends on."""

    places: int = 0
    """Number of places with a label."""
    shift: int = 0
    """1 if a place predicts the next token, 0 if it has a label of its own."""
    silent: int = 0
    """Number of places with a label and without a gradient."""
    silent_rows: int = 0
    """Number of rows with labels in which no place has a gradient."""
    first_silent: str = ""
    """The first silent place."""
    outside: float | None = None
    """Largest gradient at a place without a label, as a share of the largest at one with a label; None if unknown."""
    first_outside: str = ""
    """The first place without a label whose gradient is more than half as large."""
    padding: float | None = None
    """The same for a place that predicts a token which the attention mask hides; None if unknown."""
    first_padding: str = ""
    """The first such place."""
    other_shift: int | None = None
    """Another shift, with which the gradients are exactly where the labels are; None if there is none."""
    told_by: str = ""
    """Mask or weights in the batch that are zero where labelled places have no gradient; empty if there is none."""
    left_out: str = ""
    """Why nothing could be compared; empty if something was."""
    error: str = ""
    """The exception that ended the look; empty if none did."""


@dataclass(frozen=True, kw_only=True)
class AimRecord:
    """The direction in which the loss of the first micro-batch pulls, compared with cross-entropy's."""

    at: str = ""
    """Where gradients were compared: `logits` or `last hidden state`."""
    places: int = 0
    """Number of places with a label that the model did not know yet."""
    cosine: float | None = None
    """Mean cosine between the two gradients of a place; None if nothing was compared."""
    joint_cosine: float | None = None
    """Cosine between the gradients of all places together; None if nothing was compared."""
    against: int = 0
    """Number of places with a negative cosine."""
    left_out: str = ""
    """Why nothing could be compared; empty if something was."""
    error: str = ""
    """The exception that ended the look; empty if none did."""


@dataclass(frozen=True, kw_only=True)
class FutureRecord:
    """The last hidden state of tokens whose later tokens, or whose neighbouring rows, were changed."""

    tokens: int = 0
    """Number of tokens before a changed one that were compared."""
    rows: int = 0
    """Number of rows of the batch."""
    change: float | None = None
    """Largest change of a token before a changed one, in standard deviations of its state; None if not compared."""
    where: str = ""
    """Row and token with the largest change."""
    other_rows: float | None = None
    """Largest change in a row in which no token was changed; None if not compared."""
    other_row: str = ""
    """The row with that change."""
    reached: float = 0.0
    """Largest change at a changed token or after it: 0 if the model does not read what was changed."""
    left_out: str = ""
    """Why nothing could be compared; empty if something was."""
    error: str = ""
    """The exception that ended the look; empty if none did."""
