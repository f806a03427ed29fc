"""C6: two processes that share a batch learn what one learns from the whole of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard import verdicts
from pytest_sftguard.invariants._comparing import MOST_IN, ComparingSplits, gap, moved, randomness
from pytest_sftguard.records import RunRecord
from pytest_sftguard.verdicts import Finding

_SAME = 1e-5
"""How closely norms of the same tensor agree that two types of device have summed up, as a share."""

_DEVICES = "the processes run on {theirs} and the cell on {ours}"


class Reason(verdicts.Reason):
    """Why two processes may learn something else than one."""

    REFUSED = "it cannot be trained in two processes: {error}"
    NO_DIGEST = "the adapters of two processes were not digested"
    APART = "the processes end with adapters that differ from each other: they train apart"
    DEVICE_PRECISION = f"{_DEVICES}: only float32 agrees closely enough on both"
    DEVICE_BASE = f"{_DEVICES}, where the base has other weights"
    DEVICE_TENSORS = f"{_DEVICES}, where other tensors are trained"
    DEVICE_START = f"{_DEVICES}, where the adapter begins with other numbers"
    DIFFERS = (
        "the {name} of step {step} is {ours:.6g} in one process, and {theirs:.6g} in two that share the same rows"
        f"{MOST_IN}"
    )
    OWN_LOSS = f"{DIFFERS}; the loss is no mean over labels, and only its author can say whether it may"
    MOVED = "{factor} moved by {ours:.4g} in one process, and by {theirs:.4g} in two"


@dataclass(frozen=True, kw_only=True)
class ReplicaEquivalence(ComparingSplits):
    """Loss and gradients of the first step are those of one process, and so is what the adapter became."""

    update_ratio: float = 1.1
    """Factor by which the `lora_A`, the `lora_B`, or the other tensors may have moved further, or less far, than in one
    process."""

    code: ClassVar[str] = "C6"
    reference: ClassVar[str] = "replicas"
    differs: ClassVar[Reason] = Reason.DIFFERS

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Compare the processes with each other, then with the one."""
        # DDP refuses some models, loudly: nothing was trained that could be unsound
        error = None if reference is None or reference.steps else reference.error
        if error is not None and not error.guards_own:
            yield self.not_evaluated(Reason.REFUSED, required=False, error=str(error))
        else:
            yield from super().check(record, reference)

    def compare(self, record: RunRecord, reference: RunRecord) -> Iterator[Finding]:
        """Compare the adapters of the processes, then the first step, then how far the adapter moved."""
        digests = reference.replica_digests
        if len(digests) < 2 or not all(digests):
            yield self.not_evaluated(Reason.NO_DIGEST)
            return
        if len(set(digests)) > 1:
            yield self.failed(Reason.APART)
        obstacle = self._elsewhere(record, reference) or self.other_rows(record, reference)
        if obstacle := obstacle or self.drawing(record, reference, "loss", "unknown"):
            yield obstacle
            return
        findings = [*self._first_step(record, reference), *self._updates(record, reference)]
        yield from findings or self.even(reference)

    def _elsewhere(self, record: RunRecord, reference: RunRecord) -> Finding | None:
        """Why runs on devices of two types cannot be compared; None where they can."""
        devices = {"ours": record.device.device_type, "theirs": reference.device.device_type}
        bases = [r.base.digest_before if r.base is not None else "" for r in (record, reference)]
        ours, theirs = ({t.name: t.initial_norm for t in r.adapter} for r in (record, reference))
        obstacles = {
            Reason.DEVICE_PRECISION: record.precision != "fp32",
            Reason.DEVICE_BASE: not bases[0] or bases[0] != bases[1],
            Reason.DEVICE_TENSORS: ours.keys() != theirs.keys(),
            Reason.DEVICE_START: not all(_alike(norm, theirs.get(name)) for name, norm in ours.items()),
        }
        reason = next((r for r, stands in obstacles.items() if stands), None)
        if reason is None or devices["ours"] == devices["theirs"]:
            return None
        return self.not_evaluated(reason, required=False, **devices)

    def _first_step(self, record: RunRecord, reference: RunRecord) -> Iterator[Finding]:
        of_loss, of_norm = self.usual_rtols(record, reference)
        yield from self.value("loss", of_loss, record, reference)
        # each process scales what DDP averages later
        skipped = any(r.steps[0].effect == "skipped_by_scaler" for r in (record, reference))
        if not randomness(record, reference) and not skipped:
            yield from self.value("grad_norm", of_norm, record, reference)

    def excuse(self, ours: float, theirs: float, record: RunRecord, reference: RunRecord) -> Reason | None:
        """A loss that is no mean over labels may depend on the processes, but for a factor of their number."""
        own = {self.average(r) for r in (record, reference)} == {"other"}
        doubled = any(gap(a, b) <= self.scale_rtol for a, b in ((ours, theirs * 2), (ours * 2, theirs)))
        return Reason.OWN_LOSS if own and not doubled else None

    def _updates(self, record: RunRecord, reference: RunRecord) -> Iterator[Finding]:
        """How far the tensors moved in the same steps on the same rows, where nothing is drawn."""
        if len(record.steps) != len(reference.steps) or randomness(record, reference):
            return
        pairs = zip(record.steps, reference.steps, strict=True)
        if any(s.effect != r.effect or self.other_rows(record, reference, n) for n, (s, r) in enumerate(pairs, 1)):
            return
        others = moved(reference)
        for factor, ours in moved(record).items():
            theirs = others.get(factor, math.nan)
            if not (ours <= theirs * self.update_ratio and theirs <= ours * self.update_ratio):
                share, limit = theirs / ours if ours else None, self.update_ratio
                yield self.failed(Reason.MOVED, observed=share, limit=limit, factor=factor, ours=ours, theirs=theirs)
                return


def _alike(one: float | None, other: float | None) -> bool:
    return one is not None and other is not None and gap(one, other) <= _SAME
