"""What was seen of the trained adapter: its file, and its answers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pytest_sftguard.records.names import NONE, Names


@dataclass(frozen=True, kw_only=True)
class FinitenessRecord:
    """The batch that the trained and the reloaded model were given, and what became of their logits."""

    rows: int
    """Rows of the batch."""
    tokens: int
    """Tokens of each."""
    padded_rows: int
    """Rows with padding in front, under an attention mask."""
    attention: str
    """The kind of attention that both models said they ran with; empty where they do not say."""
    logits: int
    """Logits that were looked at: those of tokens that the mask lets through."""
    nonfinite: int = 0
    """Those of them that are NaN or infinite."""
    unpadded: str = ""
    """Why no row could be padded; empty where one was."""
    not_eager: str = ""
    """Why attention could not be written out; empty where it was."""


@dataclass(frozen=True, kw_only=True)
class RoundTripRecord:
    """The adapter's way into a file and back onto a fresh base."""

    file_bytes: int
    """Size of the adapter's weight file."""
    tensors: int
    """Tensors in the file."""
    missing: Names = NONE
    """Tensors of the adapter that the file lacks, or holds in another shape."""
    unexpected: Names = NONE
    """Tensors in the file that the adapter does not have."""
    nonfinite: Names = NONE
    """Tensors in the file that hold NaN or infinity."""
    zero: Names = NONE
    """Low-rank factors in the file that are zero throughout, so that their layer is the base's."""
    differing: Names = NONE
    """Tensors that are not the same bits in the trained model and in the reloaded one."""
    load_warnings: tuple[str, ...] = ()
    """Warnings of the load that speak of missing, unexpected or mismatched tensors."""
    fresh_base_digest: str = ""
    """Digest of the fresh base that the adapter was loaded onto."""
    rescaled: Names = NONE
    """LoRA layers that have another scaling in the reloaded model, with both."""
    computed_otherwise: Names = NONE
    """Modules of the trained model whose class or forward is another than the reloaded one's: fused kernels, say, which
    sum in another order."""
    restored: bool = False
    """Whether that base was put together again by merging, as pissa and its like take their factors out of it."""
    max_abs_logit: float | None = None
    """Largest absolute logit of the trained model on the probe batch."""
    max_logit_change: float | None = None
    """Largest absolute difference between the trained and the reloaded model's logits."""
    max_logit_effect: float | None = None
    """Largest absolute difference between the reloaded model's logits and those of the fresh base."""
    other_seed: int | None = None
    """Seed that the fresh base was built under; None where a base is drawn from the seed as a whole."""
    drawn: Names = NONE
    """Base tensors that came out otherwise under the other seed, with their first such row: nobody else has them."""
    finiteness: FinitenessRecord | None = None
    """The batch that the logits are of."""
    max_base_change: float | None = None
    """Largest absolute difference between the trained model's logits with its adapter disabled and the fresh base's."""
    base_differs: str = ""
    """Why a disabled adapter does not give the base's logits here, soundly; empty where it must."""


@dataclass(frozen=True, kw_only=True)
class AnswerRecord:
    """One answer of the reloaded adapter, generated greedily."""

    prompt: str
    """What the model was given."""
    text: str
    """What came back, the seeded prefix included."""
    expected: float
    """The number that would be right."""
    parsed: float | None = None
    """The number that the target's `parse_answer` read, or None."""
    stopped: bool | None = None
    """Whether an end token was generated within the budget; None where generation knows none."""

    @property
    def is_number(self) -> bool:
        """Whether a finite number was read."""
        return self.parsed is not None and math.isfinite(self.parsed)

    def is_right(self, rtol: float) -> bool:
        """Whether the number that was read is the expected one, within a share of it."""
        return self.parsed is not None and abs(self.parsed - self.expected) <= rtol * abs(self.expected)
