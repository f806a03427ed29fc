"""A3: what is trained, and what the optimizer remembers of it, is float32."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard.precision import MODES
from pytest_sftguard.records import Names, RunRecord
from pytest_sftguard.verdicts import Finding, Invariant

_WIDE = ("float32", "float64")
_FLOATING = "float"


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
            yield self.not_evaluated("the types of the trainable tensors were not seen")
            return
        mode = MODES.get(record.precision)
        asked = [t for t in record.adapter if mode and not t.is_low_rank and t.initial_dtype == mode.weights_dtype]
        begin = [t for t in record.adapter if t not in asked and t.initial_dtype not in _WIDE]
        end = [t for t in record.adapter if t not in (*asked, *begin) and t.dtype not in _WIDE]
        for when, narrow, kinds in (
            ("before the first step", begin, {str(t.initial_dtype) for t in begin}),
            ("after the last step alone", end, {t.dtype for t in end}),
        ):
            if narrow:
                yield self.failed(
                    f"{len(narrow)} of {len(record.adapter)} trainable tensors are {', '.join(sorted(kinds))} {when}:"
                    f" {Names.of(t.name for t in narrow)}",
                    observed=len(narrow), limit="float32",
                )  # fmt: skip
        if record.optimizer is None:
            yield self.not_evaluated("no optimizer was seen")
            return
        wide = {*_WIDE, *(t.dtype for t in asked)}
        states = [dtype for dtype in record.optimizer.state_dtypes if _FLOATING in dtype and dtype not in wide]
        if states:
            yield self.failed(
                f"{record.optimizer.name} keeps states in {', '.join(states)}", observed=len(states), limit="float32"
            )
