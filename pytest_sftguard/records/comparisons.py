"""Records of a model compared with itself: in company, on other paths, merged, and saved and reloaded."""

from __future__ import annotations

from dataclasses import dataclass

from pytest_sftguard.records.tensors import NONE, Names


@dataclass(frozen=True, kw_only=True)
class ComparisonRecord:
    """The logits of rows in one setting, compared with those of the same tokens alone and unpadded."""

    setting: str
    """Setting of the rows: `as trained on`, `padded left`, `padded right`, `alone`."""
    attention: str
    """Attention implementation of the setting."""
    rows: int
    """Number of sequences that were compared."""
    packed: int = 0
    """Number of those sequences that are parts of a packed row."""
    nonfinite: int = 0
    """Number of tokens with a logit that is NaN or infinite, in the setting or alone."""
    max_change: float
    """Largest distance between the centred logits of a token, relative to their norm."""
    where: str = ""
    """Row and token with the largest distance."""


@dataclass(frozen=True, kw_only=True)
class ContextRecord:
    """Whether the logits of a token depend on anything other than the tokens before it in its row."""

    arithmetic: str
    """Type in which the comparisons were computed: `float32`, `tf32`, `bfloat16` or `float16`."""
    asked: int
    """Number of comparisons that were due."""
    comparisons: tuple[ComparisonRecord, ...] = ()
    """The comparisons that were made."""
    left_out: str = ""
    """Why no rows could be compared; empty if they were."""
    overflowed: int = 0
    """Number of tokens with a logit that is not finite, for rows as trained on and in the training's arithmetic."""
    rotary: int = 0
    """Number of buffers with rotary frequencies."""
    low_rotary: Names = NONE
    """Buffers of rotary frequencies in half precision."""
    rotary_error: float = 0.0
    """Largest relative distance between a frequency and the one that the architecture computes."""
    masks: int = 0
    """Number of four-dimensional attention masks that the model was given."""
    blind_queries: int = 0
    """Number of rows of such masks that let a token attend to nothing, not even to itself."""
    inputs: tuple[str, ...] = ()
    """Names of the tensors that the model was given in training."""
    padding_seen: int = 0
    """Number of padding tokens in front of a row's first token that the row's two-dimensional mask, or a missing one,
    lets the tokens behind them attend to."""
    recurrent: str = ""
    """Type of the first layer that carries a state from token to token, such as `linear_attention`; empty if the
    configuration names none."""


@dataclass(frozen=True, kw_only=True)
class PathRecord:
    """One plain path, with which loss and gradients were compared."""

    name: str
    """`plain kernels` (the Trainer's own loss), or `plain loss` (cross-entropy written out)."""
    loss: float
    """Loss on this path."""
    max_change: float
    """Largest distance between the two gradients of a tensor, relative to the norm of the plain one."""
    tensor: str = ""
    """Tensor with the largest distance."""
    nonfinite: Names = NONE
    """Tensors whose gradient on this path is not finite."""
    one_sided: Names = NONE
    """Tensors that have a gradient on only one of the two paths."""


@dataclass(frozen=True, kw_only=True)
class PathsRecord:
    """One micro-batch on a fresh model without dropout, on the training's path and on plain ones."""

    arithmetic: str
    """Type in which the products were computed: `float32`, `tf32`, `bfloat16` or `float16`."""
    attention: str
    """Attention implementation of the training."""
    switched: tuple[str, ...] = ()
    """What the training uses and the plain path does not: `sdpa`, `checkpointing`, `compile`."""
    routed: bool = False
    """Whether the model has experts, so that rounding can change which expert is chosen."""
    tensors: int
    """Number of trainable tensors with a gradient."""
    loss: float
    """The Trainer's loss."""
    nonfinite: Names = NONE
    """Tensors whose gradient on the training's path is not finite."""
    asked: int
    """Number of plain paths that were due."""
    paths: tuple[PathRecord, ...] = ()
    """The plain paths that were computed."""


@dataclass(frozen=True, kw_only=True)
class MergeRecord:
    """The adapter merged into its base."""

    layers: int
    """Number of merged layers."""
    dtype: str
    """Narrowest storage type of their weights, a torch dtype name."""
    max_abs_logit: float | None = None
    """Largest absolute logit of the unmerged model, on the probe batch."""
    max_logit_change: float | None = None
    """Largest absolute change of a logit through merging."""
    max_saved_change: float | None = None
    """The same after the merged model was saved and loaded again; None if it was not."""
    not_saved: str = ""
    """Why the merged model was not saved and loaded; empty if it was."""
    swallowed: float | None = None
    """Share of the weights that merging left unchanged, though the adapter would change them."""
    kept: float | None = None
    """Share of the adapter's change of the weights that the merged weights contain: 1 is all of it, 0 is nothing."""
    least_kept: Names = NONE
    """The layer that kept the least of it."""
    touched: Names = NONE
    """Tensors that merging changed, though the adapter does not target them."""


@dataclass(frozen=True, kw_only=True)
class FinitenessRecord:
    """The batch that the trained and the reloaded model were given, and how many of their logits are finite."""

    rows: int
    """Number of rows."""
    tokens: int | None
    """Number of tokens in each; None where the rows are not of tokens alone, so that none can be lengthened."""
    padded_rows: int
    """Number of rows with padding in front, under an attention mask."""
    attention: str
    """Attention implementation that both models reported; empty if they do not report it."""
    logits: int
    """Number of logits, of the tokens that the mask lets through."""
    nonfinite: int = 0
    """Number of those logits that are NaN or infinite."""
    unpadded: str = ""
    """Why no row could be padded; empty if one was."""
    not_eager: str = ""
    """Why attention could not be eager; empty if it was."""


@dataclass(frozen=True, kw_only=True)
class RoundTripRecord:
    """The adapter saved to a file and loaded onto a fresh base."""

    file_bytes: int
    """Size of the adapter's weight file."""
    tensors: int
    """Number of tensors in the file."""
    missing: Names = NONE
    """Tensors of the adapter that the file lacks, or has in another shape."""
    unexpected: Names = NONE
    """Tensors in the file that the adapter does not have."""
    nonfinite: Names = NONE
    """Tensors in the file that contain NaN or infinity."""
    zero: Names = NONE
    """Low-rank factors in the file that are all zeros, so that their layer is the base's."""
    differing: Names = NONE
    """Tensors whose bits in the reloaded model are not those in the trained one."""
    file_differing: Names | None = None
    """Tensors whose numbers in the file are not those in the trained model; None if that was not compared."""
    load_warnings: tuple[str, ...] = ()
    """Warnings of the load about missing, unexpected or mismatched tensors."""
    fresh_base_digest: str = ""
    """Digest of the fresh base onto which the adapter was loaded."""
    rescaled: Names = NONE
    """LoRA layers whose scaling changed in the reloaded model, with both numbers."""
    computed_otherwise: Names = NONE
    """Modules of the trained model whose class or forward method differs from the reloaded one's, such as fused
    kernels, which sum in another order."""
    restored: bool = False
    """Whether merging restored that base, because pissa and similar inits take their factors out of it."""
    max_abs_logit: float | None = None
    """Largest absolute logit of the trained model, on the probe batch."""
    max_logit_change: float | None = None
    """Largest absolute difference between the logits of the trained and of the reloaded model."""
    max_logit_effect: float | None = None
    """Largest absolute difference between the logits of the reloaded model and of the fresh base."""
    other_seed: int | None = None
    """Seed of the fresh base; None if the whole base depends on the seed, so that it kept the training's."""
    drawn: Names = NONE
    """Base tensors that differ under the other seed, with the first such row: nobody else has them."""
    finiteness: FinitenessRecord | None = None
    """The batch of the logits."""
    not_asked: str = ""
    """The exception that ended the comparison of logits, as `Type: message`; empty if none did."""
    max_base_change: float | None = None
    """Largest absolute difference between the logits of the trained model with its adapter disabled and of the fresh
    base."""
    base_differs: str = ""
    """Why a disabled adapter rightly does not give the base's logits; empty if it must give them."""
