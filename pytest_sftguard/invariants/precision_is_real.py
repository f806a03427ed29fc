"""A6: the arithmetic really had the precision that the cell names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard.precision import MODES, PrecisionMode
from pytest_sftguard.records import RunRecord
from pytest_sftguard.verdicts import Finding, Invariant

_FLOATING = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True, kw_only=True)
class PrecisionIsReal(Invariant):
    """Every adapted layer's matrix product had the mode's type; otherwise the cell is no evidence."""

    code: ClassVar[str] = "A6"

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Compare what the layers returned in the first micro-batch with what the mode promises."""
        mode = MODES.get(record.precision)
        if mode is None:
            yield self.not_evaluated(f"{record.precision!r} is no precision that is known here")
            return
        if not record.compute_dtypes or not record.weights_dtypes:
            yield self.not_evaluated("no matrix product of an adapted layer was seen")
            return
        seen = ", ".join(f"{dtype} in {n}" for dtype, n in sorted(record.compute_dtypes.items()))
        if set(record.compute_dtypes) != {mode.compute_dtype}:
            yield self.not_evaluated(
                f"{mode.name} did not happen: the adapted layers computed {seen} layers, not {mode.compute_dtype}"
            )
        if any(dtype in _FLOATING and dtype != mode.weights_dtype for dtype in record.weights_dtypes):
            held = ", ".join(sorted(record.weights_dtypes))
            yield self.not_evaluated(
                f"{mode.name} did not happen: the base's weights are {held}, not {mode.weights_dtype};"
                " does the target pass `dtype` on to from_pretrained?"
            )
        if mode.scaler and not record.loss_scaling:
            yield self.not_evaluated(f"{mode.name} did not happen: no loss scaler was at work")
        if mode.autocast and record.autocast_dtype != mode.compute_dtype:
            yield self.not_evaluated(f"{mode.name} did not happen: autocast was {record.autocast_dtype or 'off'}")
        if not mode.autocast and record.autocast_dtype is not None:
            yield self.not_evaluated(f"{mode.name} did not happen: autocast was {record.autocast_dtype}")
        if mode.compute_dtype == "float32":
            yield from self._tf32(record, mode)

    def _tf32(self, record: RunRecord, mode: PrecisionMode) -> Iterator[Finding]:
        if record.tf32 is None:
            if mode.cuda_only or record.device.device_type == "cuda":
                yield self.not_evaluated("whether matrix products ran in tf32 was not seen")
        elif record.tf32 != (mode.name == "tf32"):
            state = "on" if record.tf32 else "off"
            yield self.not_evaluated(f"{mode.name} did not happen: tf32 was {state} for matrix products")
