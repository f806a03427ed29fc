"""Records of what holds throughout the training: dropout that is on, a base that stays, layers that are reached."""

from __future__ import annotations

from dataclasses import dataclass

from pytest_sftguard.records.tensors import NONE, Names


@dataclass(frozen=True, kw_only=True)
class RandomnessRecord:
    """Dropout layers in the first two steps, and the generator at the first eight micro-batches."""

    evaluating: bool | None = None
    """Whether the whole model was in evaluation mode in a forward pass of the training; None if none was seen."""
    base_dropout: float = 0.0
    """Largest dropout probability in the base's configuration."""
    adapter_dropout: float = 0.0
    """The dropout probability that the adapter's configuration asks for."""
    adapter_dropouts: int = 0
    """Number of the adapter's dropout layers that a forward pass called."""
    adapter_off: Names = NONE
    """Those that were called and dropped nothing: in evaluation mode, or with the probability 0."""
    other_dropouts: int = 0
    """Number of the base's own dropout layers, of a probability above 0, that a forward pass called."""
    other_off: Names = NONE
    """Those that were called in evaluation mode."""
    drawing: int = 0
    """Number of the compared micro-batches whose loss drew random numbers."""
    compared: int = 0
    """Number of micro-batches whose generator was compared."""
    repeated_step: int | None = None
    """First step whose loss began with the state of the generator of an earlier micro-batch; None if none did."""
    repeats_step: int | None = None
    """Step of that earlier micro-batch."""


@dataclass(frozen=True, kw_only=True)
class BaseDuringRecord:
    """The base inside `train()`, compared with the base before it."""

    tensors: int
    """Number of its tensors."""
    steps: tuple[int, ...] = ()
    """Steps before whose first micro-batch it was looked at: the first, and the last."""
    changed: Names = NONE
    """Tensors that differed at the first of these steps at which any did, without those that the forward pass
    rewrites."""
    step: int | None = None
    """That step; None if none differed."""


@dataclass(frozen=True, kw_only=True)
class ReachRecord:
    """The adapted layers that train, and whether a token passed through them in any step."""

    layers: int
    """Number of adapted layers."""
    unreached: Names = NONE
    """Layers that no token passed through, without those that may rest."""
    resting: Names = NONE
    """Layers that no token passed through and that a router chooses, where others of its choices were used."""
    dropped_layers: bool = False
    """Whether the model leaves out whole layers at random."""
