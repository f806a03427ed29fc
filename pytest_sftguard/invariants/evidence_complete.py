"""B12: the run went to its end, and everything that the other invariants judge by was seen."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard.records import ErrorRecord, RunRecord, StepRecord, numbers
from pytest_sftguard.verdicts import Finding, Invariant

_NEEDED = ("loss", "grad_norm", "max_abs_gradient", "learning_rate", "changed", "max_update", "seconds")
_NEEDED_OF_TENSORS = ("initial_norm", "final_norm", "delta_norm", "changed_fraction")


@dataclass(frozen=True, kw_only=True)
class EvidenceComplete(Invariant):
    """As many steps as asked for, as many as the Trainer counted, each with all its numbers, all of them finite."""

    code: ClassVar[str] = "B12"
    told_last: ClassVar[bool] = True
    """Other invariants say more of the same step."""

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Count first, then look for gaps."""
        if record.error is not None:
            yield self._ended_early(record, record.error)
        if record.error is None or record.error.stage not in ("build", "train"):
            yield from self._counts(record)
        yield from self._gaps(record)
        yield from self._tensors(record)
        yield from self._stray(record)

    def _ended_early(self, record: RunRecord, error: ErrorRecord) -> Finding:
        where = f" ({error.where})" if error.where else ""
        step = len(record.steps) + 1 if error.stage == "train" else None
        return self.failed(f"the run ended in {error.stage}: {error.type}: {error.message}{where}", step=step)

    def _counts(self, record: RunRecord) -> Iterator[Finding]:
        seen, counted = len(record.steps), record.global_step
        if seen != record.max_steps:
            yield self.failed(
                f"{seen} of {record.max_steps} optimizer steps were seen", observed=seen, limit=record.max_steps
            )
        if counted != seen:
            yield self.failed(
                f"the Trainer counted {counted} optimizer steps, and took {seen}", observed=counted, limit=seen
            )
        if [s.step for s in record.steps] != list(range(1, len(record.steps) + 1)):
            yield self.failed("the steps are not numbered 1, 2, 3, ...: some are missing or were taken twice")

    def _gaps(self, record: RunRecord) -> Iterator[Finding]:
        short_before = True
        for s in record.steps:
            missing = [name for name in _NEEDED if getattr(s, name) is None]
            seen, asked = len(s.micro_losses), _micro_batches(record, s.step)
            # the last step of an epoch may have fewer micro-batches. Of a stream it is not known which one that is:
            # one short step between full ones
            known = record.micro_batches_per_epoch is not None
            if not (seen == asked or (1 <= seen < asked and not short_before and not known)):
                missing.append(f"micro_losses (has {seen} of {asked})")
            short_before = seen < asked
            if record.loss_scaling and (s.loss_scale is None or s.loss_scale_after is None):
                missing.append("loss_scale")
            if missing:
                yield self.failed(f"step {s.step} lacks {', '.join(missing)}", step=s.step)
                return
        if record.error is None:
            needed = ("optimizer", "base", "adapter", "seconds", *(() if record.observed else ("round_trip",)))
            absent = [n for n in needed if not getattr(record, n)]
            if len(record.answers) != record.questions:
                absent.append(f"answers (has {len(record.answers)} of {record.questions})")
            if absent:
                yield self.failed(f"the record lacks {', '.join(absent)}")

    def _tensors(self, record: RunRecord) -> Iterator[Finding]:
        for t in record.adapter:
            missing = [name for name in _NEEDED_OF_TENSORS if getattr(t, name) is None]
            if missing:
                yield self.failed(f"{t.name} lacks {', '.join(missing)}")
                return
        for s in () if record.adapter_out_of_reach else record.steps:
            if s.effect in ("poisoned", "unknown"):
                return  # a change from or to NaN counts neither as changed nor as unchanged
            seen = (s.changed or 0) + s.unchanged.count
            if seen != len(record.adapter):
                yield self.failed(
                    f"step {s.step} saw {seen} trainable tensors, and the record holds {len(record.adapter)}",
                    step=s.step, observed=len(record.adapter), limit=seen,
                )  # fmt: skip
                return

    def _stray(self, record: RunRecord) -> Iterator[Finding]:
        stray = [(where, value) for where, value in numbers(record) if not math.isfinite(value)]
        stray = [(where, value) for where, value in stray if not _excused(record, where)]
        if stray:
            where, value = stray[0]
            step = _step_of(record, where)
            what = where if step is None else f"{where.partition('].')[2]} of step {step}"
            what += " in the Trainer's log" if where.startswith("log[") else ""
            yield self.failed(
                f"{what} is {value} ({len(stray)} numbers of the record are not finite)",
                step=step, observed=value, limit="finite",
            )  # fmt: skip


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
    skipped = {s.step for s in record.steps if s.effect == "skipped_by_scaler"}
    if where.endswith((".grad_norm", ".max_abs_gradient", ".received_grad_norm")):
        return _step_of(record, where) in skipped
    return False


def _step_of(record: RunRecord, where: str) -> int | None:
    holder, bracket, rest = where.partition("[")
    if not bracket or holder not in ("steps", "log"):
        return None
    item: StepRecord | object = getattr(record, holder)[int(rest.partition("]")[0])]
    return int(getattr(item, "step"))  # noqa: B009 - StepRecord and LogRecord both have it
