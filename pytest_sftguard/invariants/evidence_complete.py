"""B12: the run went to its end, and everything that the other invariants judge by was seen."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from pytest_sftguard import verdicts
from pytest_sftguard.records import RunRecord, numbers
from pytest_sftguard.verdicts import Finding, General, Invariant

_NEEDED = ("loss", "grad_norm", "max_abs_gradient", "learning_rate", "changed", "max_update", "seconds")
_NEEDED_OF_TENSORS = ("initial_norm", "final_norm", "delta_norm", "changed_fraction")
_NONFINITE = " is {observed} (numbers of the record that are not finite: {count})"


class Reason(verdicts.Reason):
    """What was not seen, or is not a number."""

    ENDED_EARLY = "the run ended in {stage}: {error}[[ ({where})]]"
    OTHER_STEPS = "{observed} of {limit:# optimizer step} took place"
    STOPPED = "early stopping ended the training after {steps} of {asked:# optimizer step}"
    OTHER_COUNT = "the Trainer counted {observed:# optimizer step}, and took {limit}"
    NO_COUNT = "the Trainer's count of its optimizer steps was not seen"
    OTHER_NUMBERS = "the steps are not numbered 1, 2, 3, ...: some are missing or were taken twice"
    STEP_LACKS = "step {step} lacks {missing}[[: it has {micro_losses} of {micro_batches:# micro-batch loss}]]"
    RECORD_LACKS = "the record lacks {missing}[[: it has {answers} of {questions:# answer}]]"
    TENSOR_LACKS = "{tensor} lacks {missing}"
    OTHER_TENSORS = "step {step} saw {limit:# trainable tensor}, and the record holds {observed}"
    NONFINITE = "{place}[[ of step {step}]]" + _NONFINITE
    NONFINITE_LOG = "{place} of step {step} in the Trainer's log" + _NONFINITE


@dataclass(frozen=True, kw_only=True)
class EvidenceComplete(Invariant):
    """As many steps as asked for, as many as the Trainer counted, each with all its numbers, all of them finite."""

    code: ClassVar[str] = "B12"
    told_last: ClassVar[bool] = True
    """Other invariants say more of the same step."""

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Count first, then look for gaps."""
        if record.error is not None:
            error, stage, where = str(record.error), record.error.stage, record.error.where
            step = len(record.steps) + 1 if stage == "train" else None
            if record.error.guards_own:
                yield self.not_evaluated(General.GUARD_BROKE, required=True, error=error, where=where)
            else:
                yield self.failed(Reason.ENDED_EARLY, step=step, stage=stage, error=error, where=where)
        if record.error is None or record.error.stage not in ("build", "train"):
            yield from self._counts(record)
        yield from self._gaps(record)
        yield from self._tensors(record)
        yield from self._stray(record)

    def _counts(self, record: RunRecord) -> Iterator[Finding]:
        seen, counted = len(record.steps), record.global_step
        if record.stopped and record.error is None and 1 <= seen < record.max_steps and counted == seen:
            yield self.not_evaluated(Reason.STOPPED, required=False, steps=seen, asked=record.max_steps)
        elif seen != record.max_steps:
            yield self.failed(Reason.OTHER_STEPS, observed=seen, limit=record.max_steps)
        if counted != seen:
            reason = Reason.NO_COUNT if counted is None else Reason.OTHER_COUNT
            yield self.failed(reason, observed=counted, limit=seen)
        if [s.step for s in record.steps] != list(range(1, seen + 1)):
            yield self.failed(Reason.OTHER_NUMBERS)

    def _gaps(self, record: RunRecord) -> Iterator[Finding]:
        short_before = True
        for s in record.steps:
            missing = [name for name in _NEEDED if getattr(s, name) is None]
            lacking: dict[str, Any] = {}
            seen, asked = len(s.micro_losses), _micro_batches(record, s.step)
            # the last step of an epoch may have fewer micro-batches. Of a stream it is not known which one that is:
            # one short step between full ones
            known = record.micro_batches_per_epoch is not None
            if not (seen == asked or (1 <= seen < asked and not short_before and not known)):
                missing.append("micro_losses")
                lacking = {"micro_losses": seen, "micro_batches": asked}
            short_before = seen < asked
            if record.loss_scaling and (s.loss_scale is None or s.loss_scale_after is None):
                missing.append("loss_scale")
            if missing:
                yield self.failed(Reason.STEP_LACKS, step=s.step, missing=tuple(missing), **lacking)
                return
        if record.error is None:
            needed = ("optimizer", "base", "adapter", "seconds", *(() if record.observed else ("round_trip",)))
            missing, lacking = [n for n in needed if not getattr(record, n)], {}
            if len(record.answers) != record.questions:
                missing.append("answers")
                lacking = {"answers": len(record.answers), "questions": record.questions}
            if missing:
                yield self.failed(Reason.RECORD_LACKS, missing=tuple(missing), **lacking)

    def _tensors(self, record: RunRecord) -> Iterator[Finding]:
        for t in record.adapter:
            missing = tuple(name for name in _NEEDED_OF_TENSORS if getattr(t, name) is None)
            if missing:
                yield self.failed(Reason.TENSOR_LACKS, tensor=t.name, missing=missing)
                return
        for s in () if record.adapter_out_of_reach else record.steps:
            # a change from or to NaN counts neither as changed nor as unchanged
            if s.effect in ("poisoned", "unknown"):
                return
            seen = (s.changed or 0) + s.unchanged.count
            if seen != len(record.adapter):
                yield self.failed(Reason.OTHER_TENSORS, step=s.step, observed=len(record.adapter), limit=seen)
                return

    def _stray(self, record: RunRecord) -> Iterator[Finding]:
        stray = [(where, value) for where, value in numbers(record) if not math.isfinite(value)]
        stray = [(where, value) for where, value in stray if not _excused(record, where)]
        if stray:
            where, value = stray[0]
            step = _step_of(record, where)
            reason = Reason.NONFINITE_LOG if where.startswith("log[") else Reason.NONFINITE
            place = where if step is None else where.partition("].")[2]
            yield self.failed(reason, step=step, observed=value, limit="finite", place=place, count=len(stray))


def _micro_batches(record: RunRecord, step: int) -> int:
    """How many micro-batches `step` has: as many as are accumulated, or what is left at the end of an epoch."""
    asked = record.gradient_accumulation_steps
    if not record.micro_batches_per_epoch:
        return asked
    steps_per_epoch = -(-record.micro_batches_per_epoch // asked)
    before = asked * ((step - 1) % steps_per_epoch)
    return min(asked, record.micro_batches_per_epoch - before)


def _excused(record: RunRecord, where: str) -> bool:
    """Whether a number may be infinite: gradients of a step that the scaler skipped, the log's copy, 'never clip'."""
    if where == "max_grad_norm":
        return record.max_grad_norm == math.inf
    skipped = {s.step for s in record.steps if s.skipped}
    if where.endswith((".grad_norm", ".max_abs_gradient", ".received_grad_norm")):
        return _step_of(record, where) in skipped
    return False


def _step_of(record: RunRecord, where: str) -> int | None:
    holder, bracket, rest = where.partition("[")
    if not bracket or holder not in ("steps", "log"):
        return None
    return int(getattr(record, holder)[int(rest.partition("]")[0])].step)
