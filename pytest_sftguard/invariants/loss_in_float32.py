"""B16: the loss is computed in float32."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from pytest_sftguard import verdicts
from pytest_sftguard.precision import MODES
from pytest_sftguard.records import RunRecord
from pytest_sftguard.verdicts import Finding, General, Invariant

_SIMPLE_BITS = 4
"""Significant bits of numbers that a float32 loss may well be: 0.5, 1, 3, 0.875."""
_ROUNDING = 2.0**-22
"""Relative error of a float32 loss after a division and a multiplication."""


class Reason(verdicts.Reason):
    """In which type the loss is computed, or why that cannot be told."""

    HALF = "all {observed:# distinct loss} of the micro-batches are numbers of {dtype}, as {example}"
    HALF_SUM = "all {observed:# distinct loss}, multiplied by the tokens of their step, are numbers of {dtype}"
    LIBRARY = "the losses are numbers of {dtype}: {computed_by} computes them in the type of its logits"
    NOT_KNOWN = "all losses are numbers of {dtype}, and it was not seen who computed them in a model of {weights}"
    TOO_FEW = "{observed:# distinct loss} tell too little of the type that they were computed in"


@dataclass(frozen=True, kw_only=True)
class LossInFloat32(Invariant):
    """The losses of the micro-batches are no numbers of a half-precision type.

    A number of float32 is one of bfloat16 by chance once in 65,536 times, and one of float16 once in 8,192 times.
    Numbers with few bits, such as 0, 0.5 or 3, are no evidence. A sum in half precision that is then divided in float32
    by the number of its tokens is recognised too. In a model of half-precision weights, the loss of some classes of
    transformers and of TRL is in the type of its logits: not the user's doing, and not judged.
    """

    min_losses: int = 3
    """Number of distinct losses, with more than four significant bits, that all must be numbers of the type: the
    probability of that in float32 is below 1e-9."""

    code: ClassVar[str] = "B16"

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Look at every raw loss other than zero."""
        pairs = [(loss, s.supervised_tokens or 0) for s in record.taken_steps for loss in s.micro_losses if loss]
        # a policy gradient that is taken once for each sample has a loss of exactly 0
        if not pairs and any(s.micro_losses for s in record.taken_steps):
            yield self.not_evaluated(Reason.TOO_FEW, required=False, observed=0)
            return
        if not pairs:
            yield self.not_evaluated(General.NO_STEP)
            return
        losses = sorted({loss for loss, _ in pairs})
        if record.first_step is not None and record.first_step.loss_dtype in _ROUNDED:
            yield self._half(record, record.first_step.loss_dtype, losses)
            return
        if not len(losses) >= self.min_losses:
            yield self.not_evaluated(Reason.TOO_FEW, required=False, observed=len(losses))
            return
        for dtype, rounded in _ROUNDED.items():
            if self._all_on(losses, rounded, exact=True):
                yield self._half(record, dtype, losses)
                return
            sums = [loss * tokens for loss, tokens in pairs]
            if self._all_on(sums, rounded, exact=False):
                library = self._of_the_library(record, dtype)
                seen: dict[str, Any] = {"observed": len(losses), "limit": "float32", "dtype": dtype}
                yield library or self.failed(Reason.HALF_SUM, **seen)
                return

    def _all_on(self, numbers: list[float], rounded: Callable[[float], float], *, exact: bool) -> bool:
        """Whether all `numbers` are of the type, and enough of them tell something."""
        telling = set()
        for x in numbers:
            if not math.isfinite(x) or x == 0:
                return False
            near = rounded(x)
            if not (near == x if exact else abs(near - x) <= _ROUNDING * abs(x)):
                return False
            if _significant_bits(near) > _SIMPLE_BITS:
                telling.add(near)
        return len(telling) >= self.min_losses

    def _half(self, record: RunRecord, dtype: str, losses: list[float]) -> Finding:
        if (library := self._of_the_library(record, dtype)) is not None:
            return library
        if _is_pure(record) and (record.first_step is None or not record.first_step.loss_dtype):
            return self.not_evaluated(Reason.NOT_KNOWN, required=False, dtype=dtype, weights=dtype)
        return self.failed(Reason.HALF, observed=len(losses), limit="float32", dtype=dtype, example=losses[0])

    def _of_the_library(self, record: RunRecord, dtype: str) -> Finding | None:
        """The finding where a library itself computes the loss of a model in half precision; else None."""
        first = record.first_step
        if not _is_pure(record) or first is None:
            return None
        computed_by = f"transformers' {first.loss_class}" if first.loss_class else ""
        # TRL computes a loss of its own where the model returns none
        if first.loss_library == "trl" and not any(s.model_losses for s in record.steps):
            computed_by = "trl"
        if not computed_by:
            return None
        return self.not_evaluated(Reason.LIBRARY, required=False, dtype=dtype, computed_by=computed_by)


def _is_pure(record: RunRecord) -> bool:
    """Whether all of the model is in half precision, without autocast."""
    mode = MODES.get(record.precision)
    return mode is not None and not mode.autocast and mode.weights_dtype != "float32"


def _bfloat16(x: float) -> float:
    """The nearest number of bfloat16, or one as near; of a number beyond float32 itself."""
    try:
        [bits] = struct.unpack("<I", struct.pack("<f", x))
    except OverflowError:
        return math.inf
    [near] = struct.unpack("<f", struct.pack("<I", min(bits + 0x8000, 0xFFFFFFFF) & 0xFFFF0000))
    return float(near)


def _float16(x: float) -> float:
    """The nearest number of float16; infinity for one that it does not reach."""
    try:
        [near] = struct.unpack("<e", struct.pack("<e", x))
    except OverflowError:
        return math.inf
    return float(near)


_ROUNDED: dict[str, Callable[[float], float]] = {"bfloat16": _bfloat16, "float16": _float16}


def _significant_bits(x: float) -> int:
    """Number of bits from the first to the last that is set."""
    if not math.isfinite(x) or x == 0:
        return 0
    whole = int(math.ldexp(abs(math.frexp(x)[0]), 53))
    return 53 - (whole & -whole).bit_length() + 1
