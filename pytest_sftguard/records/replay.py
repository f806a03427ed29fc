"""What the optimizer's steps do in float32, from the same gradients."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ReplayedTensorRecord:
    """One trainable tensor after all replayed steps."""

    name: str
    """Name of the parameter in the model."""
    update_norm: float
    """L2 norm of the sum of its updates in the training."""
    replay_norm: float
    """The same in the replay."""


@dataclass(frozen=True, kw_only=True)
class ReplayedStepRecord:
    """One replayed step, by the tensor that is furthest from its replay by then."""

    step: int
    """Number of the optimizer step, from 1."""
    tensor: str
    """Name of the tensor whose updates so far differ most from the replay's, by their ratio."""
    update_norm: float
    """L2 norm of the sum of its updates so far."""
    replay_norm: float
    """The same in the replay."""


@dataclass(frozen=True, kw_only=True)
class ReplayRecord:
    """A second optimizer of the same class on float32 copies, given the gradients that the first one was given."""

    optimizer: str
    """Class of the optimizer."""
    steps: tuple[ReplayedStepRecord, ...] = ()
    """Every step that was taken, in order; those that the loss scaler skipped are left out."""
    tensors: tuple[ReplayedTensorRecord, ...] = ()
    """Every trainable tensor that the optimizer holds."""
