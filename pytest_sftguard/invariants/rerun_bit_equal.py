"""C3: the same training, with the same seed, on the same machine, is the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard import verdicts
from pytest_sftguard.invariants._comparing import MOST_IN, ComparingSteps, both_skipped, exact, same_bits
from pytest_sftguard.precision import mode_named
from pytest_sftguard.records import RunRecord
from pytest_sftguard.verdicts import Finding


class Reason(verdicts.Reason):
    """What is not the same when a training is run again."""

    ROWS = "step {step} saw other rows when it was run again with the same seed"
    BITS = "the {name} of step {step} is {limit}, and was {observed} when it was run again with the same seed"
    DIFFERS = (
        "the {name} of step {step} is {ours:.6g}, and was {theirs:.6g} when it was run again with the same seed"
        f"{MOST_IN}"
    )


@dataclass(frozen=True, kw_only=True)
class RerunBitEqual(ComparingSteps):
    """A second run sees the same rows, and by one thread of a CPU gets the same bits.

    Where the order of sums is not fixed (several threads, a GPU), its first step agrees within the tolerances.
    """

    code: ClassVar[str] = "C3"
    reference: ClassVar[str] = "rerun"
    differs: ClassVar[Reason] = Reason.DIFFERS

    def compare(self, record: RunRecord, reference: RunRecord) -> Iterator[Finding]:
        """Compare step by step, then the trained adapters."""
        if unequal := self.other_length(record, reference):
            yield unequal
        elif other := next((s.step for s, o in zip(record.steps, reference.steps, strict=True) if s.rows != o.rows), 0):
            yield self.failed(Reason.ROWS, step=other)
        elif exact(record, reference):
            yield from self._bits(record, reference)
        else:
            allowed = mode_named(record.precision).agreement
            yield from self.value("loss", allowed.loss_rtol, record, reference)
            if not both_skipped(record.steps[0], reference.steps[0]):
                yield from self.value("grad_norm", allowed.grad_norm_rtol, record, reference)

    def _bits(self, record: RunRecord, reference: RunRecord) -> Iterator[Finding]:
        for ours, theirs in zip(record.steps, reference.steps, strict=True):
            if unseen := self.unseen(ours, "loss", "grad_norm"):
                yield unseen
                return
            for name in ("loss", "grad_norm", "learning_rate", "loss_scale"):
                if not same_bits(name, ours, theirs):
                    one, other = getattr(ours, name), getattr(theirs, name)
                    yield self.failed(Reason.BITS, step=ours.step, observed=other, limit=one, name=name)
                    return
        yield from self.adapters(record, reference)
