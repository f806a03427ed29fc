"""D1: what is in the file is what was trained, and it works on a fresh base."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard import verdicts
from pytest_sftguard.invariants._due import at_rest, layer_of
from pytest_sftguard.invariants._reloaded import not_reloaded
from pytest_sftguard.precision import MODES
from pytest_sftguard.records import Names, RoundTripRecord, RunRecord
from pytest_sftguard.verdicts import Finding, Invariant


class Reason(verdicts.Reason):
    """What saving and reloading did to the adapter."""

    NOT_SAVED = "the adapter was not saved and reloaded"
    EMPTY = "the adapter file is empty ({file_bytes:# byte})"
    MISSING = "the adapter file lacks {observed:# tensor}, or has another shape there: {tensors}"
    UNEXPECTED = "the adapter file has {observed:# tensor} that the adapter does not have: {tensors}"
    NOT_FINITE = "the adapter file has {observed:# tensor} with NaN or infinity: {tensors}"
    ZERO = "the adapter file has {observed:# tensor} of zeros alone, whose layers are the base's: {tensors}"
    OTHER_BITS = "reloading changed the bits of {observed:# tensor}: {tensors}"
    RESCALED = "reloading changed the scaling of {observed:# layer}: {layers}"
    WARNED = "loading warned: {warning}"
    BASE_NOT_DIGESTED = "the fresh base was not digested"
    BASE_DRAWN = (
        "building the target under another seed changes {observed:# tensor} of the base, and the adapter file lacks"
        " them, so that nobody else has them: {tensors}"
    )
    BASE_CHANGES = (
        "the target builds another base each time it is called with the same seed, so that the adapter is loaded onto"
        " weights that it was not trained on"
    )
    NO_LOGITS = "no logits were compared"
    LOGITS = "logits of the reloaded adapter differ from the trained model's by {observed:.3g}"
    NO_EFFECT = "the reloaded adapter changes no logit: the base answers under its name"


@dataclass(frozen=True, kw_only=True)
class RoundTrip(Invariant):
    """The saved adapter holds every tensor, loads onto the same base without a word, and gives the same logits."""

    logits_rtol: float | None = None
    """Largest change of a logit, relative to the largest logit; None: the tolerance of the cell's precision."""

    recomputed_rtol: float = 3e-5
    """The least that is allowed where modules of the trained model compute by a class or a forward of their own, which
    peft's do not have: another order of sums, in every layer. Measured for LoRA's sums in fused products, in float32:
    up to 3.3e-6 on a model of five layers, up to 1.9e-6 on one of thirty."""
    restored_rtol: float = 1e-4
    """The least that is allowed where the base had to be put together again by merging the untrained adapter: its
    weights are an ulp off, and decomposed anew. Measured 8e-6 for pissa in float32, 0.4 for pissa_niter, which draws
    another decomposition on every load."""
    restored_factor: float = 4.0
    """How many times the tolerance of the cell's precision is allowed there, of the largest logit or of the largest
    effect of the adapter, if that is larger. Measured in bfloat16, in units of that tolerance, on 24 trainings of 11
    architectures with pissa and olora: 0.44 in the median, 1.5 at most."""

    code: ClassVar[str] = "D1"
    asks_for: ClassVar[tuple[str, ...]] = ("round_trip",)

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Look at the file, at the load, and at the two models' logits."""
        trip = record.round_trip
        if trip is None:
            yield self.not_evaluated(Reason.NOT_SAVED)
            return
        yield from self._file(record, trip)
        # whatever follows from NaN would only repeat it
        if not trip.nonfinite:
            yield from self._base(record, trip)
            yield from self._logits(record, trip)

    def _file(self, record: RunRecord, trip: RoundTripRecord) -> Iterator[Finding]:
        if not trip.tensors >= 1:
            yield self.failed(Reason.EMPTY, observed=0, limit="at least 1 tensor", file_bytes=trip.file_bytes)
        resting = at_rest(record) if trip.zero else set()
        zero = [n for n in trip.zero.first if layer_of(n) not in resting]
        for reason, names in (
            (Reason.MISSING, trip.missing),
            (Reason.UNEXPECTED, trip.unexpected),
            (Reason.NOT_FINITE, trip.nonfinite),
            (Reason.ZERO, Names.of(zero) if resting else trip.zero),
            (Reason.OTHER_BITS, trip.differing),
        ):
            if names:
                yield self.failed(reason, observed=names.count, limit=0, tensors=names)
        if trip.rescaled:
            yield self.failed(Reason.RESCALED, observed=trip.rescaled.count, limit=0, layers=trip.rescaled)
        if trip.load_warnings:
            warned = trip.load_warnings
            yield self.failed(Reason.WARNED, observed=len(warned), limit=0, warning=warned[0])

    def _base(self, record: RunRecord, trip: RoundTripRecord) -> Iterator[Finding]:
        if record.base is None or not trip.fresh_base_digest:
            yield self.not_evaluated(Reason.BASE_NOT_DIGESTED)
        elif trip.drawn:
            yield self.failed(Reason.BASE_DRAWN, observed=trip.drawn.count, limit=0, tensors=trip.drawn)
        elif trip.fresh_base_digest != record.base.digest_before:
            yield self.failed(Reason.BASE_CHANGES)

    def _logits(self, record: RunRecord, trip: RoundTripRecord) -> Iterator[Finding]:
        if broken := not_reloaded(self, record):
            yield broken
            return
        if trip.max_abs_logit is None or trip.max_logit_change is None or trip.max_logit_effect is None:
            yield self.not_evaluated(Reason.NO_LOGITS)
            return
        mode = MODES.get(record.precision)
        rtol = self.logits_rtol if self.logits_rtol is not None else (mode.logits_rtol if mode else 0.0)
        if trip.computed_otherwise:
            rtol = max(rtol, self.recomputed_rtol)
        scale = trip.max_abs_logit
        if trip.restored:
            rtol, scale = max(self.restored_factor * rtol, self.restored_rtol), max(scale, trip.max_logit_effect)
        limit = rtol * scale
        if not (math.isfinite(limit) and trip.max_logit_change <= limit):
            yield self.failed(Reason.LOGITS, observed=trip.max_logit_change, limit=limit)
        if not (math.isfinite(trip.max_logit_effect) and trip.max_logit_effect > 0):
            yield self.failed(Reason.NO_EFFECT, observed=trip.max_logit_effect, limit="> 0")
