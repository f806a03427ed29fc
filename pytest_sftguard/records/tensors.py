"""Records of tensors: those that train, those that must not change, and how the adapter starts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

_NAMES_KEPT = 1024
"""More than a large model has trainable tensors, so that a list is complete and a file still bounded."""


@dataclass(frozen=True)
class Names:
    """A count of tensors, and their names."""

    count: int = 0
    """Number of tensors."""
    first: tuple[str, ...] = ()
    """Their names, at most 1,024."""

    @classmethod
    def of(cls, names: Iterable[str]) -> Names:
        """Count `names` and keep them, up to the bound."""
        every = tuple(names)
        return cls(len(every), every[:_NAMES_KEPT])

    def __bool__(self) -> bool:
        return self.count != 0

    def __str__(self) -> str:
        if not self.first:
            return f"{self.count} tensors"
        more = self.count - 1
        return self.first[0] + (f" and {more} more" if more > 0 else "")


NONE = Names()
"""No tensor at all."""


@dataclass(frozen=True, kw_only=True)
class TensorRecord:
    """One trainable tensor over the whole run."""

    name: str
    """Name of the parameter in the model."""
    dtype: str
    """Storage type at the end, a torch dtype name."""
    initial_dtype: str | None = None
    """Storage type before the first step."""
    elements: int
    """Number of elements."""
    initial_norm: float | None = None
    """L2 norm before the first step; 0 for a factor that starts at zero, as `lora_B` does."""
    final_norm: float | None = None
    """L2 norm after the last step."""
    delta_norm: float | None = None
    """L2 norm of (after - before); NaN if the tensor is not finite."""
    changed_fraction: float | None = None
    """Share of the elements that are finite and that any step changed. It is not (after != before): an update by the
    sign alone can bring an element back to its start."""
    partial: bool = False
    """Whether a step may skip some elements, as in a tensor that holds the factors of all experts of a block."""
    chosen_from: str = ""
    """Path of the list of experts that its layer is in, of which a router chooses some; empty for any other layer."""
    first_gradient_norm: float | None = None
    """L2 norm of its gradient in the first step with finite gradients only; None if there is no such step, or no
    gradient in it."""

    @property
    def is_low_rank(self) -> bool:
        """Whether the tensor is a part of the adapter that peft made, rather than a copy of one of the base's."""
        return any(part.startswith("lora_") for part in self.name.split("."))

    @property
    def is_factor(self) -> bool:
        """Whether the tensor is a low-rank factor of a linear layer, every element of which every product uses."""
        return not self.partial and any(part in ("lora_A", "lora_B") for part in self.name.split("."))


@dataclass(frozen=True, kw_only=True)
class OptimizerRecord:
    """The optimizer after the run."""

    name: str
    """Class name, such as `AdamW`."""
    fused: bool = False
    """Whether it steps in one fused kernel."""
    eps: float | None = None
    """`eps` of the first group; None if it has none."""
    weight_decay: float | None = None
    """`weight_decay` of the first group; None if it has none."""
    betas: tuple[float, ...] = ()
    """Adam's decay rates, those of the group with the largest possible update; empty outside the Adam family."""
    state_dtypes: tuple[str, ...] = ()
    """Types of its floating-point states with more than one element."""
    owns_trainables: bool | None = None
    """Whether its parameters are exactly the trainable ones."""
    lacking: Names = NONE
    """Tensors that it does not own, though they were trainable when the training began, or are at its end."""
    foreign: Names = NONE
    """Tensors of the model that it owns and that became trainable only after the training had begun."""
    without_rate: Names = NONE
    """Trainable tensors in groups with the learning rate 0, while another group has a positive one."""
    twice: Names = NONE
    """Tensors that it owns in more than one place."""
    idle: int = 0
    """Number of parameters that it owns and that no gradient reaches: frozen ones, and ones outside the model."""


@dataclass(frozen=True, kw_only=True)
class BaseRecord:
    """The tensors that must not change: every parameter and buffer that is not part of the adapter."""

    tensors: int
    """Number of such tensors."""
    digest_before: str
    """Digest of all of them before the first step."""
    digest_after: str
    """Digest of all of them after the last step."""
    changed: Names = NONE
    """Tensors whose bits differ."""
    rewritten: Names = NONE
    """Buffers outside the state dict that the model's own forward pass rewrites; they are allowed to change."""
    trainable: Names = NONE
    """Tensors that have `requires_grad`, though they are not part of the adapter."""
    rearranged: Names = NONE
    """4-bit layers that were trained through in the layout for inference on a CPU, which has no backward pass."""


@dataclass(frozen=True, kw_only=True)
class FamilyRecord:
    """The weights of the base whose modules have one class and one last name, such as all `q_proj`."""

    name: str
    """Last name and class, as `q_proj (Linear)`."""
    weights: int
    """Number of weights of two dimensions or more."""
    adapted: int
    """Number of those that the active adapter adapts, or saves as a whole."""
    elements: int
    """Number of elements of all."""
    adapted_elements: int
    """Number of elements of the adapted ones."""

    def __str__(self) -> str:
        return f"{self.name} {self.adapted}/{self.weights}"


@dataclass(frozen=True, kw_only=True)
class WiringRecord:
    """The trainable tensors, compared with what the adapter's configuration asks for."""

    trainable: int
    """Number of tensors that take a gradient."""
    modules: int
    """Number of modules that the active adapter is attached to."""
    frozen: Names = NONE
    """Tensors of the active adapter that take no gradient, without those that one of peft's optimizers freezes."""
    strays: Names = NONE
    """Tensors that take a gradient and are not part of the active adapter."""
    unmatched: Names = NONE
    """Targets of the configuration that match no module of the model."""
    incomplete: Names = NONE
    """Modules that a target matches and that have no factors of the active adapter."""
    disabled: bool = False
    """Whether the adapter was disabled, so that no forward pass used it."""
    without_adapter: bool = False
    """Whether the model has no adapter, so that tensors of its own train."""
    families: tuple[FamilyRecord, ...] = ()
    """The weights of the base by family, and how many of them the adapter reaches."""
    fused: Names = NONE
    """Weights of experts in one tensor with the name of a target, which reaches layers of this name alone."""
    left_out: Names = NONE
    """Layers with the name of a target that have no adapter, though others of this name have one."""
    beyond_one_digit: Names = NONE
    """Layers from number 10 on that a target with a bare `\\d` misses."""


@dataclass(frozen=True, kw_only=True)
class InitialRecord:
    """The factors before the first step, and what they did to the base's logits."""

    factors: int
    """Number of modules with a pair of factors."""
    init: str
    """`init_lora_weights` of the configuration: `True`, `False`, `gaussian`, `pissa`, ..."""
    identical: bool
    """Whether an adapter with this init leaves the base's results as they are, bit for bit."""
    neutral: bool
    """Whether an adapter with this init leaves the base's results as they are, apart from rounding."""
    loaded: bool | None = None
    """Whether another seed gave the same factors, as factors from a file do; None if that was not tried."""
    zero_a: Names = NONE
    """Factors that are zero and must not be, because nothing can pass them."""
    nonzero_b: Names = NONE
    """Factors that are not zero and must be, unless they were loaded."""
    wrong_scaling: Names = NONE
    """Modules whose scaling does not follow from the configuration's rank and alpha, with both numbers."""
    zero_scaling: Names = NONE
    """Modules whose factors are multiplied by zero, as with `lora_alpha=0`."""
    logits: int | None = None
    """Number of logits compared with the base's, in evaluation mode; None if none could be compared."""
    changed_logits: int | None = None
    """Number of those logits that differ, or are finite in only one of the two."""
    max_logit_change: float | None = None
    """Largest absolute difference of two finite logits."""
    max_abs_logit: float | None = None
    """Largest finite absolute logit of the base."""
    uncompared: str = ""
    """Why no logits were compared; empty if they were."""


@dataclass(frozen=True, kw_only=True)
class FoundationRecord:
    """The base before the first step."""

    tensors: int
    """Number of parameters and buffers."""
    nonfinite: Names = NONE
    """Tensors that contain NaN or infinity; a buffer may contain -inf, as masks do."""
    not_loaded: Names = NONE
    """Tensors that the checkpoint lacked, or had in another shape, and that no adapter trains instead."""
    zero_magnitudes: Names = NONE
    """DoRA magnitudes with a zero: a row of the weight that is all zeros has the direction 0/0."""
    zero_embeddings: Names = NONE
    """Token ids that the data attends to, and whose frozen embedding is all zeros."""
