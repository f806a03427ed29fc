"""C6: two processes that share a batch learn what one learns from the whole of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard.invariants._comparing import (
    OTHER,
    Apart,
    apart,
    average,
    closeness,
    gap,
    moved,
    other_rows,
    randomness,
    uneven,
)
from pytest_sftguard.records import RunRecord
from pytest_sftguard.verdicts import Finding, Invariant

_SAME = 1e-5
"""How closely norms of the same tensor agree that two kinds of device have summed up, as a share."""


@dataclass(frozen=True, kw_only=True)
class ReplicaEquivalence(Invariant):
    """Loss and gradients of the first step are those of one process, and so is what the adapter became."""

    loss_rtol: float | None = None
    """Largest difference of the losses, as a share; None: the tolerance of the cell's precision."""

    grad_norm_rtol: float | None = None
    """Largest difference of the gradients' norms in more than half of the tensors, as a share, and a fifteenth of that
    of the norm of all; None: the tolerance of the cell's precision."""

    piecemeal_rtol: float = 1e-3
    """Largest difference of the losses where that of two processes is the mean or the sum of theirs."""

    update_ratio: float = 1.1
    """Factor by which a kind of tensor may have moved further, or less far, than in one process."""

    token_rtol: float = 2e-5
    """Largest difference of a loss from the mean over its labels, as a share, to count as that mean."""

    scale_rtol: float = 0.05
    """How closely one loss is the double of the other, to be a factor of the number of processes."""

    code: ClassVar[str] = "C6"
    reference: ClassVar[str] = "replicas"

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Compare the processes with each other, then with the one."""
        if reference is not None and reference.error is not None and not reference.steps:
            error = reference.error  # DDP refuses some models, loudly: nothing was trained that could be unsound
            yield self.not_evaluated(
                f"it cannot be trained in two processes: {error.type}: {error.message}", required=False
            )
        elif missing := self.not_compared(reference):
            yield missing
        elif reference is not None:
            yield from self._compared(record, reference)

    def _compared(self, record: RunRecord, reference: RunRecord) -> Iterator[Finding]:
        digests = reference.replica_digests
        if not record.steps or not reference.steps or len(digests) < 2 or not all(digests):
            yield self.not_evaluated("no optimizer step of two processes was seen")
            return
        if len(set(digests)) > 1:
            yield self.failed("the processes end with adapters that differ from each other: they train apart")
        reason = self._incomparable(record, reference)
        if reason:
            yield self.not_evaluated(reason, required=False)
            return
        findings = [*self._first_step(record, reference), *self._updates(record, reference)]
        yield from findings
        if not findings and uneven(reference) is False:
            yield self.not_evaluated(
                "both processes have as many labels in step 1, so that a mean of their means would look the same",
                required=False,
            )

    def _incomparable(self, record: RunRecord, reference: RunRecord) -> str:
        if record.device.device_type != reference.device.device_type and (reason := self._elsewhere(record, reference)):
            ours, theirs = record.device.device_type, reference.device.device_type
            return f"the processes are on a {theirs}, and the cell is on a {ours}: {reason}"
        if reason := other_rows(record, reference):
            return reason
        if randomness(record, reference) in ("loss", "unknown"):
            return "the model draws random numbers in training, such as dropout, and each process draws its own"
        return ""

    def _elsewhere(self, record: RunRecord, reference: RunRecord) -> str:
        """Why runs on devices of two kinds cannot be compared; empty where they can."""
        if record.precision != "fp32":
            return "float32 alone agrees closely enough on both"
        bases = [r.base.digest_before if r.base is not None else "" for r in (record, reference)]
        if not bases[0] or bases[0] != bases[1]:
            return "the base is another one there"
        ours, theirs = ({t.name: t.initial_norm for t in r.adapter} for r in (record, reference))
        if ours.keys() != theirs.keys():
            return "other tensors are trained there"
        if not all(_alike(norm, theirs[name]) for name, norm in ours.items()):
            return "the adapter begins with other numbers there"
        return ""

    def _first_step(self, record: RunRecord, reference: RunRecord) -> Iterator[Finding]:
        of_loss, of_norm = closeness(record, reference, self.token_rtol, self.piecemeal_rtol)
        ours, theirs = record.steps[0], reference.steps[0]
        wanted = [("loss", of_loss if self.loss_rtol is None else self.loss_rtol)]
        skipped = "skipped_by_scaler" in (ours.effect, theirs.effect)  # each process scales what DDP averages later
        if not randomness(record, reference) and not skipped:
            wanted.append(("grad_norm", of_norm if self.grad_norm_rtol is None else self.grad_norm_rtol))
        for name, rtol in wanted:
            one, other = getattr(ours, name), getattr(theirs, name)
            if one is None or other is None:
                yield self.not_evaluated(f"the {name} of step 1 was not seen")
            elif far := apart(name, (one, other), rtol, record, reference):
                yield self._apart(name, one, other, far, record, reference)

    def _apart(
        self, name: str, one: float, other: float, far: Apart, record: RunRecord, reference: RunRecord
    ) -> Finding:
        message = f"the {name} of step 1 is {one:.6g} in one process, and {other:.6g} in two that share the same rows"
        message += far.note
        kinds = {average(r, self.token_rtol) for r in (record, reference)}
        whole = gap(one, other * 2) <= self.scale_rtol or gap(one * 2, other) <= self.scale_rtol
        if kinds == {OTHER} and not whole:
            return self.not_evaluated(
                f"{message}; the loss is no mean over labels, so that its author alone can say whether it may",
                required=False,
            )
        return self.failed(message, step=1, observed=far.share, limit=far.limit)

    def _updates(self, record: RunRecord, reference: RunRecord) -> Iterator[Finding]:
        """How far each kind of tensor moved in the same steps on the same rows, where nothing is drawn."""
        if len(record.steps) != len(reference.steps) or randomness(record, reference):
            return
        pairs = zip(record.steps, reference.steps, strict=True)
        if any(s.effect != r.effect or other_rows(record, reference, s.step) for s, r in pairs):
            return
        theirs = moved(reference)
        for kind, ours in moved(record).items():
            other = theirs.get(kind, float("nan"))
            if not (ours <= other * self.update_ratio and other <= ours * self.update_ratio):
                yield self.failed(
                    f"{kind} moved by {ours:.4g} in one process, and by {other:.4g} in two",
                    observed=other / ours if ours else None, limit=self.update_ratio,
                )  # fmt: skip
                return


def _alike(one: float | None, other: float | None) -> bool:
    return one is not None and other is not None and gap(one, other) <= _SAME
