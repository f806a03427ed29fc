"""A6: the arithmetic really had the precision that the cell names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard import verdicts
from pytest_sftguard.precision import MODES, PrecisionMode
from pytest_sftguard.records import RunRecord
from pytest_sftguard.verdicts import Finding, Invariant

_FLOATING = ("float16", "bfloat16", "float32", "float64")
_NOT_REAL = "{mode} did not happen: "


class Reason(verdicts.Reason):
    """What of the precision did not happen, or was not seen."""

    UNKNOWN_MODE = "the precision {precision!r} is not known here"
    NOT_SEEN = "no matrix product of an adapted layer was seen"
    COMPUTED = _NOT_REAL + "{layers} of {total:# adapted layer} computed in {dtypes}, not in {due}"
    WEIGHTS = _NOT_REAL + "the base's weights are {dtypes}, not {due}; does the target pass on `dtype`?"
    NOT_QUANTISED = _NOT_REAL + (
        "the base's weights are {dtypes}, not quantised; in this mode a target with the parameter `quantization_config`"
        " is given one, to be passed on to from_pretrained"
    )
    NO_SCALER = _NOT_REAL + "no loss scaler was at work"
    AUTOCAST = _NOT_REAL + "autocast was {autocast}, not {due}"
    TF32 = _NOT_REAL + "tf32 was {tf32} for matrix products"
    TF32_NOT_SEEN = "whether matrix products ran in tf32 was not seen"


@dataclass(frozen=True, kw_only=True)
class PrecisionIsReal(Invariant):
    """Every adapted layer's matrix product had the mode's type; otherwise the cell is no evidence."""

    code: ClassVar[str] = "A6"

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Compare what the layers returned in the first micro-batch with what the mode promises."""
        mode = MODES.get(record.precision)
        if mode is None:
            yield self.not_evaluated(Reason.UNKNOWN_MODE, precision=record.precision)
            return
        if not record.compute_dtypes or not record.weights_dtypes:
            yield self.not_evaluated(Reason.NOT_SEEN)
            return
        name, due = mode.name, mode.compute_dtype
        others = {dtype: layers for dtype, layers in sorted(record.compute_dtypes.items()) if dtype != due}
        if others:
            layers, total = sum(others.values()), sum(record.compute_dtypes.values())
            yield self.not_evaluated(
                Reason.COMPUTED, mode=name, layers=layers, total=total, dtypes=tuple(others), due=due
            )
        yield from self._weights(record, mode)
        if mode.scaler and not record.loss_scaling:
            yield self.not_evaluated(Reason.NO_SCALER, mode=name)
        autocast = due if mode.autocast else None
        if record.autocast_dtype != autocast:
            seen = record.autocast_dtype or "off"
            yield self.not_evaluated(Reason.AUTOCAST, mode=name, autocast=seen, due=autocast or "off")
        if due == "float32":
            yield from self._tf32(record, mode)

    def _weights(self, record: RunRecord, mode: PrecisionMode) -> Iterator[Finding]:
        weights = tuple(sorted(record.weights_dtypes))
        if mode.quantisation:
            # a head and embeddings are not quantised, and may be adapted too
            if all(dtype in _FLOATING for dtype in weights):
                yield self.not_evaluated(Reason.NOT_QUANTISED, mode=mode.name, dtypes=weights)
        elif any(dtype in _FLOATING and dtype != mode.weights_dtype for dtype in weights):
            yield self.not_evaluated(Reason.WEIGHTS, mode=mode.name, dtypes=weights, due=mode.weights_dtype)

    def _tf32(self, record: RunRecord, mode: PrecisionMode) -> Iterator[Finding]:
        if record.tf32 is None:
            if mode.cuda_only or record.device.device_type == "cuda":
                yield self.not_evaluated(Reason.TF32_NOT_SEEN)
        elif record.tf32 != (mode.name == "tf32"):
            yield self.not_evaluated(Reason.TF32, mode=mode.name, tf32="on" if record.tf32 else "off")
