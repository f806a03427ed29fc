"""Cases of what is seen step by step: gradients, sizes of updates, learning rates, the log."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from pytest_sftguard.matrix import Cell
from pytest_sftguard.records import (
    LogRecord,
    Names,
    ReplayedStepRecord,
    ReplayedTensorRecord,
    ReplayRecord,
    RunRecord,
    ScheduleRecord,
    StepRecord,
)
from tests.support.canned import HEAD, A, B, healthy, lost, with_step, with_steps, within

SCALED = Cell("fp16-mixed", 2, 1)
NAN = math.nan


def DERIVED(record: RunRecord) -> dict[str, Any]:  # noqa: N802 - one of the tables
    """What the recorder, the schedule and the replay would have seen of the steps of `record`."""
    taken = [s for s in record.steps if s.effect != "skipped_by_scaler"]
    rates = [s.learning_rate or 0.0 for s in taken or record.steps]
    rates += rates[-1:] * (len(record.steps) - len(rates))
    steps, due = [], 0
    # the schedule waits for skipped steps
    for s in record.steps:
        steps.append(dataclasses.replace(_with_update(s), learning_rate=rates[due]))
        due += s.effect != "skipped_by_scaler"
    assert record.optimizer is not None
    norm = record.grad_norms[-1]
    replayed = {"update_norm": norm, "replay_norm": norm} if math.isfinite(norm) else _ONE
    return {
        "steps": tuple(steps),
        "max_grad_norm": 1e4,
        "optimizer": dataclasses.replace(record.optimizer, betas=(0.9, 0.999)),
        "schedule": ScheduleRecord(name="LambdaLR", rates=tuple(rates)),
        "replay": ReplayRecord(
            optimizer="AdamW",
            steps=tuple(ReplayedStepRecord(step=s.step, tensor=B, **replayed) for s in taken),
            tensors=tuple(ReplayedTensorRecord(name=t.name, **replayed) for t in record.adapter),
        ),
    }


_ONE = {"update_norm": 1.0, "replay_norm": 1.0}


def _with_update(step: StepRecord) -> StepRecord:
    return dataclasses.replace(
        step,
        max_update_ratio=1.0 if step.changed else 0.0,
        max_update_tensor=B if step.changed else "",
        received_grad_norm=step.grad_norm,
    )


def _rates(*rates: float, skipped: tuple[int, ...] = (), due: tuple[float, ...] = ()) -> RunRecord:
    """A record of steps that used `rates`, where the schedule has `due`."""
    cell = SCALED if skipped else Cell("fp32", 2, 1)
    record = healthy(cell, steps=len(rates), skipped=skipped)
    steps = tuple(dataclasses.replace(s, learning_rate=r) for s, r in zip(record.steps, rates, strict=True))
    return dataclasses.replace(record, steps=steps, schedule=ScheduleRecord(name="LambdaLR", rates=due or rates))


def _logged(step: int, **changes: Any) -> RunRecord:
    record = healthy()
    log = tuple(dataclasses.replace(line, **changes) if line.step == step else line for line in record.log)
    return dataclasses.replace(record, log=log)


def _every_second(**changes: Any) -> RunRecord:
    """A record whose log has one line for each two steps, the second with `changes`."""
    record = with_steps(healthy(), loss=1.0, micro_losses=(1.0,))
    lines = [LogRecord(step=n, loss=1.0, learning_rate=1.0) for n in (2, 4)]
    return dataclasses.replace(record, log=(lines[0], dataclasses.replace(lines[1], **changes)))


def _replayed(moved: float, replayed: float, step: int | None = None) -> RunRecord:
    """A record in which lora_A went `moved` far, and `replayed` in float32, which shows from `step` on."""
    record = healthy()
    assert record.replay is not None
    off = {"update_norm": moved, "replay_norm": replayed}
    tensors = tuple(dataclasses.replace(t, **off) if t.name == A else t for t in record.replay.tensors)
    steps = record.replay.steps
    if step is not None:
        steps = tuple(dataclasses.replace(s, tensor=A, **off) if s.step >= step else s for s in steps)
    return within(record, "replay", tensors=tensors, steps=steps)


_MISSING = with_step(healthy(head=True), 3, missing_gradients=Names.of([A]))
_GOOD = healthy()
_LINEAR = (1.0, 0.75, 0.5, 0.25)

FAILURES = {
    "gradient_present": {
        "missing": (_MISSING, f"at step 3 {A} had no gradient"),
        "missing-at-first": (with_step(healthy(), 1, missing_gradients=Names.of([A])), "step 1 .* had no gradient"),
        "zero": (with_step(healthy(), 2, zero_gradients=Names.of([A])), f"step 2 {A} had a gradient of exactly zero"),
        "zero-lora_B": (with_step(healthy(), 1, zero_gradients=Names.of([B])), f"step 1 {B} had a gradient of exactly"),
        "without-effect": (
            with_step(healthy(), 3, changed=0, missing_gradients=Names.of([A, B])),
            "step 3 .* and 1 more had no gradient",
        ),
        "all-zero": (
            with_step(healthy(), 2, zero_gradients=Names.of([A, B])),
            "step 2 .* and 1 more had a gradient of exactly zero",
        ),
        "head-never": (
            with_steps(healthy(head=True), zero_gradients=Names.of([HEAD])),
            f"{HEAD} had no gradient other than zero at any of 4 steps",
        ),
        "no-adapter": (healthy(adapter=()), "no trainable tensor"),
    },
    "update_upper_bound": {
        "too-far": (with_step(healthy(), 2, max_update_ratio=41.0), f"{B} moved by 41 learning rates at step 2"),
        "nan": (with_step(healthy(), 2, max_update_ratio=NAN), "moved by nan learning rates at step 2"),
        "betas": (
            within(with_step(healthy(), 4, max_update_ratio=3.3), "optimizer", betas=(0.5, 0.9)),
            "AdamW moves it by 3.2 at most",
        ),
        "no-betas-at-all": (
            within(with_step(healthy(), 4, max_update_ratio=3.3), "optimizer", betas=(1.0, 1.0)),
            "3.2 at most",
        ),
    },
    "update_lower_bound": {
        "swallowed": (_replayed(0.036, 0.077, 3), f"updates of {A} add up to 0.036 by step 3, .* 0.077 .1 of 2"),
        "blown-up": (_replayed(40.0, 1.0, 2), "add up to 40 by step 2"),
        "at-the-end-alone": (_replayed(40.0, 1.0), "add up to 40, those"),
        "still": (_replayed(0.0, 1.0, 1), "add up to 0 by step 1"),
        "on-its-own": (_replayed(1.0, 0.0), "add up to 1, those"),
        "nan": (_replayed(NAN, 1.0, 4), "add up to nan by step 4"),
        "replay-nan": (_replayed(1.0, NAN), "in float32 to nan"),
        "both-nan": (_replayed(NAN, NAN), "in float32 to nan"),
        "both-inf": (_replayed(math.inf, math.inf), "in float32 to inf"),
    },
    "lr_trace": {
        "twice-as-fast": (
            _rates(1.0, 0.5, 0.0, 0.0, due=_LINEAR),
            "step 2 used the learning rate 0.5, which is that of effective step 3; by LambdaLR it is 0.75 at effective",
        ),
        "beside-it": (
            _rates(1.0, 0.75, 0.6, 0.25, due=_LINEAR),
            "step 3 used the learning rate 0.6, which is none of the schedule's; by LambdaLR",
        ),
        "behind": (_rates(1.0, 1.0, 0.75, 0.5, due=_LINEAR), "step 2 used the learning rate 1"),
        "ahead-without-a-skip": (_rates(0.75, 0.5, 0.25, 0.25, due=_LINEAR), "step 1 used"),
        "ahead-by-more-than-the-skips": (
            _rates(1.0, 0.5, 0.5, 0.25, skipped=(1,), due=(1.0, 0.9, 0.5, 0.25)),
            "step 2 used .* after 1 step that the loss scaler skipped",
        ),
        "ahead-beyond-the-budget": (
            _rates(*[0.9**i for i in range(6)], skipped=(1, 2, 3, 4)),
            "step 5 used .* effective step 1 after 4",
        ),
        "nan": (_rates(1.0, NAN, 0.5, 0.25, due=_LINEAR), "step 2 used the learning rate nan"),
        "zero-twice": (_rates(0.0, 0.0, 0.5, 1.0), "learning rate was 0 at 2 of 4 steps .*step 2"),
        "negative": (_rates(1.0, -1.0, -2.0, 1.0), "learning rate was not positive at 2 of 4 .*-2 at step 3"),
        "zeros-of-no-known-schedule": (
            dataclasses.replace(_rates(0.0, 0.0, 0.5, 1.0), schedule=ScheduleRecord(name="X", unknown="so")),
            "learning rate was 0 at 2 of 4",
        ),
    },
    "log_honest": {
        "other-loss": (_logged(2, loss=9.0), "logged loss 9 at step 2, where the loss was"),
        "zero": (_logged(2, loss=0.0), "logged loss 0 at step 2"),
        "nan-from-nowhere": (_logged(2, loss=NAN), "logged loss nan at step 2"),
        "laundered": (
            with_step(healthy(), 2, micro_losses=(NAN,), loss=NAN),
            "laundered: the Trainer logged loss .* at step 2, where the loss of micro-batch 1 of step 2 was nan",
        ),
        "laundered-before-the-sum": (
            with_step(healthy(), 3, micro_losses=(math.inf,)),
            "micro-batch 1 of step 3 was inf",
        ),
        "laundered-in-the-sum": (with_step(healthy(), 3, loss=NAN), "the loss of step 3 was nan"),
        "laundered-by-the-mean": (
            with_step(_every_second(), 3, micro_losses=(NAN,), loss=NAN),
            "logged loss 1 at step 4, where the loss of micro-batch 1 of step 3 was nan",
        ),
        "other-mean": (_every_second(loss=1.5), "logged loss 1.5 at step 4, where the mean of 2 steps was 1"),
        "gradients-cleaned": (
            with_step(healthy(), 3, grad_norm=NAN, nonfinite_gradients=Names.of([A])),
            f"laundered: the gradients of step 3 were not finite in {A}",
        ),
        "gradients-zeroed": (with_step(healthy(), 3, received_grad_norm=0.0), "the optimizer was given zeros"),
    },
}

NOT_EVALUATED = {
    "gradient_present": {
        "no-norm": (with_steps(healthy(), grad_norm=None), "no gradient was seen"),
        "device-lost": (lost(), "were out of reach afterwards"),
        "skipped-alone": (healthy(SCALED, steps=2, skipped={1, 2}), "skipped every step"),
    },
    "update_upper_bound": {
        "no-optimizer": (healthy(optimizer=None), "no optimizer step was seen"),
        "one-beta": (within(healthy(), "optimizer", betas=(0.9,)), "two betas were not seen"),
        "no-ratio": (with_step(healthy(), 2, max_update_ratio=None), "how far step 2 moved"),
    },
    "update_lower_bound": {
        "lost": (healthy(replay=None), "left nothing to judge by"),
        "a-tensor-less": (within(healthy(), "replay", tensors=_GOOD.replay.tensors[1:]), "the replay lacks 1 tensor: "),
        "no-tensor": (within(healthy(adapter=()), "replay", tensors=()), "no tensor was replayed"),
        "a-step-less": (within(healthy(), "replay", steps=_GOOD.replay.steps[1:]), "the replay has 3 of 4 steps"),
    },
    "lr_trace": {
        "no-step": (dataclasses.replace(healthy(), steps=()), "no optimizer step was seen"),
        "no-rate": (with_step(healthy(), 2, learning_rate=None), "no learning rate was seen at step 2"),
        "no-schedule": (healthy(schedule=None), "no schedule was seen"),
        "short": (within(healthy(), "schedule", rates=(1.0,)), "computed for 1 of 4 steps only"),
    },
}

THRESHOLDS = {
    ("update_upper_bound", "max_ratio"): (with_step(healthy(), 2, max_update_ratio=5.0), 1.0, 1.0),
    ("update_lower_bound", "max_factor"): (_replayed(5.0, 1.0), 1.0, 1.0),
    ("lr_trace", "rtol"): (_rates(1.0, 0.8, 0.5, 0.25, due=_LINEAR), 0.0, 0.01),
    ("lr_trace", "max_ahead_early"): (
        _rates(1.0, 1.0, 0.5, 0.25, skipped=(1, 2), due=(1.0, 0.75, 0.5, 0.25)),
        0,
        1,
    ),
    ("lr_trace", "max_ahead_late"): (
        _rates(*[0.9**i for i in range(24)], skipped=(1, 2, 3, 12, 13)),
        0,
        1,
    ),
    ("lr_trace", "max_zero_steps"): (_rates(0.0, 0.0, 0.0, 1.0), 0, 1),
    ("log_honest", "rtol"): (_logged(2, loss=_GOOD.log[1].loss * 1.5), 0.0, 0.1),
    ("log_honest", "atol"): (_logged(2, loss=_GOOD.log[1].loss + 0.5), 0.0, 0.1),
}
