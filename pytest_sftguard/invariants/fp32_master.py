"""A3: what is trained, and what the optimizer remembers of it, is float32."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from pytest_sftguard import verdicts
from pytest_sftguard.precision import MODES
from pytest_sftguard.records import Names, RunRecord
from pytest_sftguard.verdicts import Finding, General, Invariant

_WIDE = ("float32", "float64")
_FLOATING = "float"


class Reason(verdicts.Reason):
    """What is narrower than float32, and when."""

    NOT_SEEN = "the types of the trainable tensors were not seen"
    NARROW_AT_FIRST = "{observed} of {total:# trainable tensor} had the type {dtypes} before the first step: {names}"
    NARROW_AT_LAST = "{observed} of {total:# trainable tensor} had the type {dtypes} only after the last step: {names}"
    NARROW_STATES = "{optimizer} keeps states in {dtypes}"


@dataclass(frozen=True, kw_only=True)
class Fp32Master(Invariant):
    """Every trainable tensor, before the first step and after the last, and every optimizer state is float32 or wider.

    In bfloat16 a weight near 1 does not move by less than 0.004, and in float16 Adam's eps is 0. Whoever knows that
    and trains in half precision all the same waives this invariant by name. Where the cell itself is one of half
    precision weights, what the adapter trains of the base (a head, biases) is as it was asked for; factors are not.
    """

    code: ClassVar[str] = "A3"

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Look at the types of the tensors at both ends of the run, and of the states at its end."""
        if not record.adapter or any(not t.dtype or not t.initial_dtype for t in record.adapter):
            yield self.not_evaluated(Reason.NOT_SEEN)
            return
        mode = MODES.get(record.precision)
        asked = [t for t in record.adapter if mode and not t.is_low_rank and t.initial_dtype == mode.weights_dtype]
        factors = [t for t in record.adapter if t not in asked]
        first = {t.name: str(t.initial_dtype) for t in factors if t.initial_dtype not in _WIDE}
        last = {t.name: t.dtype for t in factors if t.name not in first and t.dtype not in _WIDE}
        for reason, narrow in ((Reason.NARROW_AT_FIRST, first), (Reason.NARROW_AT_LAST, last)):
            if narrow:
                total, dtypes, names = len(record.adapter), tuple(sorted({*narrow.values()})), Names.of(narrow)
                yield self.failed(
                    reason, observed=len(narrow), limit="float32", total=total, dtypes=dtypes, names=names
                )
        if record.optimizer is None:
            yield self.not_evaluated(General.NO_OPTIMIZER)
            return
        wide = {*_WIDE, *(t.dtype for t in asked)}
        states = tuple(d for d in record.optimizer.state_dtypes if _FLOATING in d and d not in wide)
        if states:
            seen: dict[str, Any] = {"optimizer": record.optimizer.name, "dtypes": states}
            yield self.failed(Reason.NARROW_STATES, observed=len(states), limit="float32", **seen)
