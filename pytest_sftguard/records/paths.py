"""What was seen of one micro-batch computed twice: as the training computes it, and plainly."""

from __future__ import annotations

from dataclasses import dataclass

from pytest_sftguard.records.names import NONE, Names


@dataclass(frozen=True, kw_only=True)
class PathRecord:
    """The plain path that loss and gradients were compared with."""

    name: str
    """`plain kernels` (the Trainer's own loss), or `plain loss` (cross-entropy written out)."""
    loss: float
    """Its loss."""
    max_change: float
    """Largest distance between two gradients of one tensor, relative to the plain one's norm."""
    tensor: str = ""
    """The tensor that it was seen at."""
    nonfinite: Names = NONE
    """Tensors whose gradient is not finite here."""
    one_sided: Names = NONE
    """Tensors that have a gradient on one of the two paths alone."""


@dataclass(frozen=True, kw_only=True)
class PathsRecord:
    """One micro-batch on a fresh model, without dropout, on the way that the training goes and on plain ones."""

    arithmetic: str
    """Type that the products were computed in: `float32`, `tf32`, `bfloat16` or `float16`."""
    attention: str
    """Implementation of attention that the training uses."""
    switched: tuple[str, ...] = ()
    """What the training uses and the plain path does without: `sdpa`, `checkpointing`, `compile`."""
    routed: bool = False
    """Whether the model has experts, which a rounding can choose otherwise."""
    tensors: int
    """Trainable tensors with a gradient."""
    loss: float
    """The Trainer's loss."""
    nonfinite: Names = NONE
    """Tensors whose gradient is not finite on the way that the training goes."""
    asked: int
    """Plain paths that were to be compared with."""
    paths: tuple[PathRecord, ...] = ()
    """Those that were."""
