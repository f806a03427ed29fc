"""D1: what is in the file is what was trained, and it works on a fresh base."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard.precision import MODES
from pytest_sftguard.records import RoundTripRecord, RunRecord
from pytest_sftguard.verdicts import Finding, Invariant


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

    code: ClassVar[str] = "D1"
    asks_for: ClassVar[tuple[str, ...]] = ("round_trip",)

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Look at the file, at the load, and at the two models' logits."""
        trip = record.round_trip
        if trip is None:
            yield self.not_evaluated("the adapter was not saved and reloaded")
            return
        yield from self._file(trip)
        if trip.nonfinite:
            return  # whatever follows from NaN would only repeat it
        yield from self._base(record, trip)
        yield from self._logits(record, trip)

    def _file(self, trip: RoundTripRecord) -> Iterator[Finding]:
        if not trip.tensors >= 1:
            yield self.failed(
                f"the adapter file is empty ({trip.file_bytes} bytes)", observed=0, limit="at least 1 tensor"
            )
        for what, names in (
            ("are missing from the file, or have another shape there", trip.missing),
            ("in the file do not belong to the adapter", trip.unexpected),
            ("in the file are not finite", trip.nonfinite),
            ("in the file are zero throughout, so that their layers are the base's", trip.zero),
            ("are not the same bits after reloading", trip.differing),
        ):
            if names:
                yield self.failed(f"{names.count} tensors {what}: {names}", observed=names.count, limit=0)
        if trip.rescaled:
            yield self.failed(
                f"{trip.rescaled.count} layers have another scaling after reloading: {trip.rescaled}",
                observed=trip.rescaled.count, limit=0,
            )  # fmt: skip
        if trip.load_warnings:
            yield self.failed(f"loading warned: {trip.load_warnings[0]}", observed=len(trip.load_warnings), limit=0)

    def _base(self, record: RunRecord, trip: RoundTripRecord) -> Iterator[Finding]:
        if record.base is None or not trip.fresh_base_digest:
            yield self.not_evaluated("the fresh base was not digested")
        elif trip.drawn:
            yield self.failed(
                f"{trip.drawn.count} tensors of the base come out otherwise where the target is built under another"
                f" seed, and the adapter file does not hold them, so that nobody else has them: {trip.drawn}",
                observed=trip.drawn.count, limit=0,
            )  # fmt: skip
        elif trip.fresh_base_digest != record.base.digest_before:
            yield self.failed(
                "the target builds another base each time it is called with the same seed, so that the adapter is"
                " loaded onto weights that it was not trained on"
            )

    def _logits(self, record: RunRecord, trip: RoundTripRecord) -> Iterator[Finding]:
        if trip.max_abs_logit is None or trip.max_logit_change is None or trip.max_logit_effect is None:
            yield self.not_evaluated("no logits were compared")
            return
        mode = MODES.get(record.precision)
        rtol = self.logits_rtol if self.logits_rtol is not None else (mode.logits_rtol if mode else 0.0)
        if trip.computed_otherwise:
            rtol = max(rtol, self.recomputed_rtol)
        if trip.restored:
            rtol = max(rtol, self.restored_rtol)
        limit = rtol * trip.max_abs_logit
        if not (math.isfinite(limit) and trip.max_logit_change <= limit):
            yield self.failed(
                f"logits of the reloaded adapter differ from the trained model's by {trip.max_logit_change:.3g}",
                observed=trip.max_logit_change, limit=limit,
            )  # fmt: skip
        if not (math.isfinite(trip.max_logit_effect) and trip.max_logit_effect > 0):
            yield self.failed(
                "the reloaded adapter changes no logit: the base answers under its name",
                observed=trip.max_logit_effect, limit="> 0",
            )  # fmt: skip
