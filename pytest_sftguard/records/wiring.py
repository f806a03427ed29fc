"""How the adapter sits on its base before the first step: what trains, what it starts from, and the base itself."""

from __future__ import annotations

from dataclasses import dataclass

from pytest_sftguard.records.names import NONE, Names


@dataclass(frozen=True, kw_only=True)
class WiringRecord:
    """What takes a gradient, held against what the adapter's configuration asks for."""

    trainable: int
    """Tensors that take a gradient."""
    modules: int
    """Modules that the active adapter is attached to."""
    frozen: Names = NONE
    """Tensors of the active adapter that take no gradient, but for those that an optimizer of peft freezes."""
    strays: Names = NONE
    """Tensors that take a gradient and are no part of the active adapter."""
    unmatched: Names = NONE
    """Targets that the configuration names, and that no module of the model answers to."""
    incomplete: Names = NONE
    """Modules that a target names, and that hold no factors of the active adapter."""
    disabled: bool = False
    """Whether the adapter was switched off, so that no forward pass goes through it."""


@dataclass(frozen=True, kw_only=True)
class InitialRecord:
    """The factors as they were before the first step, and what they did to the base's answers."""

    factors: int
    """Modules with a pair of factors that were looked at."""
    init: str
    """What the configuration says of the start: `True`, `False`, `gaussian`, `pissa`, ..."""
    identical: bool
    """Whether such an adapter leaves the base as it is, bit for bit."""
    neutral: bool
    """Whether such an adapter leaves the base as it is, but for rounding."""
    loaded: bool | None = None
    """Whether the same factors came out under another seed, as they do from a file; None where that was not tried."""
    zero_a: Names = NONE
    """Factors that are zero and ought not to be, so that nothing can pass them."""
    nonzero_b: Names = NONE
    """Factors that are not zero and ought to be, if they were not loaded."""
    wrong_scaling: Names = NONE
    """Modules whose scaling is not what rank and alpha of the configuration give, with both numbers."""
    logits: int | None = None
    """Logits that were compared with those of the base, in evaluation mode; None where none could be."""
    changed_logits: int | None = None
    """Those of them that differ, or are finite in one alone."""
    max_logit_change: float | None = None
    """Largest absolute difference of two finite logits."""
    max_abs_logit: float | None = None
    """Largest finite absolute logit of the base."""
    uncompared: str = ""
    """Why no logits were compared; empty where they were."""


@dataclass(frozen=True, kw_only=True)
class FoundationRecord:
    """The base before the first step."""

    tensors: int
    """Parameters and buffers that were looked at."""
    nonfinite: Names = NONE
    """Those that hold NaN or infinity; a buffer may hold -inf, as masks do."""
    not_loaded: Names = NONE
    """Tensors that the checkpoint lacked, or held in another shape, and that no adapter trains instead."""
    zero_magnitudes: Names = NONE
    """DoRA magnitudes with a zero: a row of the weight that is zero throughout, of which the direction is 0/0."""
    zero_embeddings: Names = NONE
    """Token ids that are attended in the data, and whose frozen embedding is zero throughout."""
