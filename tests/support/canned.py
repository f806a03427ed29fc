"""Healthy records without a training: the raw material of the tests that need no torch."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Collection, Iterable
from typing import Any

from pytest_sftguard.hardware import HardwareProfile
from pytest_sftguard.matrix import Cell, RunConfig
from pytest_sftguard.precision import mode_named
from pytest_sftguard.records import (
    AnswerRecord,
    BaseAnswersRecord,
    BaseRecord,
    ErrorRecord,
    FinitenessRecord,
    LogRecord,
    LookRecord,
    Names,
    OptimizerRecord,
    ParserRecord,
    RoundTripRecord,
    RunRecord,
    StepRecord,
    TensorRecord,
)
from pytest_sftguard.tiers import LOOKS

CPU = HardwareProfile(device_type="cpu", name="Some CPU", total_memory_bytes=2**34, threads=1)
T4 = HardwareProfile(device_type="cuda", name="Tesla T4", total_memory_bytes=2**34, capability="7.5")
H100 = HardwareProfile(device_type="cuda", name="NVIDIA H100", count=2, total_memory_bytes=2**36, capability="9.0")

CELL = Cell("fp32", 2, 1)

_LAYER = "base_model.model.model.layers.0.self_attn.q_proj"
A = f"{_LAYER}.lora_A.default.weight"
B = f"{_LAYER}.lora_B.default.weight"
HEAD = "base_model.model.lm_head.modules_to_save.default.weight"


def healthy(
    cell: Cell = CELL,
    *,
    steps: int = 4,
    skipped: Collection[int] = (),
    idle: bool = False,
    answers: Iterable[float | None] = (),
    head: bool = False,
    log: bool = True,
    device: HardwareProfile | None = None,
    values: Iterable[float] = (0.5, 1.25, 2.0),
    **changes: Any,
) -> RunRecord:
    """A record of `steps` optimizer steps that every built-in invariant passes.

    `skipped` are the steps that the loss scaler skipped, `idle` says that the first other one has learning rate 0,
    `answers` are the parsed answers, `head` adds a trainable tensor that is no factor, `values` are the positive
    numbers that measured quantities take in turn, and `changes` replace fields of the record.
    """
    mode = mode_named(cell.precision)
    device = device or (H100 if mode.cuda_only else CPU)
    draw = itertools.cycle(values)
    names = [A, B, *([HEAD] if head else [])]
    taken = [n for n in range(1, steps + 1) if n not in skipped]
    applied = taken[idle:]
    scale = 65536.0
    made = []
    for n in range(1, steps + 1):
        step = _step(n, names, cell.gradient_accumulation_steps, draw)
        if mode.scaler:
            after = scale / 2 if n in skipped else scale
            step = dataclasses.replace(step, loss_scale=scale, loss_scale_after=after)
            scale = after
        if n in skipped:
            step = _still(step, names, grad_norm=math.nan, max_abs_gradient=math.inf, nonfinite_gradients=Names.of([B]))
        elif n not in applied:
            step = _still(step, names, learning_rate=0.0)
        elif n == applied[0]:
            # lora_B is zero until here, and shields lora_A
            step = dataclasses.replace(
                step, changed=len(names) - 1, unchanged=Names.of([A]), zero_gradients=Names.of([A])
            )
        made.append(step)
    logit = next(draw)
    base = BaseRecord(tensors=12, digest_before="5eed", digest_after="5eed")
    record = RunRecord(
        cell=str(cell),
        precision=cell.precision,
        per_device_train_batch_size=cell.per_device_train_batch_size,
        gradient_accumulation_steps=cell.gradient_accumulation_steps,
        max_steps=steps,
        seed=0,
        target="some.module:build_trainer",
        device=device,
        versions={"python": "3.11.7", "torch": "2.13.0"},
        compute_dtypes={mode.compute_dtype: 2},
        weights_dtypes={mode.storage_dtype: 2},
        autocast_dtype=mode.compute_dtype if mode.autocast else None,
        loss_scaling=mode.scaler,
        tf32=mode.name == "tf32" if device.device_type == "cuda" else None,
        optimizer=OptimizerRecord(
            name="AdamW", eps=1e-8, weight_decay=0.0, state_dtypes=("float32",), owns_trainables=True
        ),
        max_grad_norm=1.0,
        steps=tuple(made),
        log=tuple(map(_line, made)) if log else (),
        global_step=steps,
        adapter=tuple(_tensor(n, n != A or len(applied) > 1, draw) for n in names),
        base=base,
        round_trip=RoundTripRecord(
            file_bytes=4096,
            tensors=len(names),
            fresh_base_digest=base.digest_before,
            max_abs_logit=logit,
            max_logit_change=logit * mode.logits_rtol / 2,
            max_logit_effect=next(draw),
            other_seed=1,
            finiteness=FinitenessRecord(rows=2, tokens=18, padded_rows=1, attention="eager", logits=2048),
            max_base_change=0.0,
        ),
        answers=tuple(
            AnswerRecord(
                prompt=f"{i} km in m", text=f"<answer>{parsed}", expected=1000.0 * i, parsed=parsed, stopped=True
            )
            for i, parsed in enumerate(answers, 1)
        ),
        seconds=next(draw),
    )
    from tests.support.cases import modules

    record = dataclasses.replace(
        record,
        questions=len(record.answers),
        parser=ParserRecord(tried=20) if record.answers else None,
        base_answers=BaseAnswersRecord(answers=record.answers, taught=0, rows=8) if record.answers else None,
        looks=tuple(_look(name, bool(record.answers)) for name in LOOKS),
    )
    for module in modules():
        record = dataclasses.replace(record, **getattr(module, "FIELDS", _nothing)(cell, names))
    for module in modules():
        record = dataclasses.replace(record, **getattr(module, "DERIVED", _nothing_more)(record))
    return dataclasses.replace(record, **changes)


def _look(name: str, asked: bool) -> LookRecord:
    """A look that came to its end; the one at answers has none to look at where nothing is asked."""
    return LookRecord(name=name, inapplicable="" if asked or name != "base_answers" else "no questions are asked")


def _nothing(cell: Cell, names: list[str]) -> dict[str, Any]:
    return {}


def _nothing_more(record: RunRecord) -> dict[str, Any]:
    return {}


def of(config: RunConfig, **changes: Any) -> RunRecord:
    """A healthy record of the run that `config` asks for."""
    asked = {"seed": config.seed, "target": config.target, "model": config.model}
    return healthy(config.cell, steps=config.steps, **(asked | changes))


def failing(config: RunConfig) -> RunRecord:
    """A record of `config` whose second step has the loss NaN."""
    return with_step(of(config), 2, loss=math.nan, micro_losses=(math.nan,) * config.cell.gradient_accumulation_steps)


def not_run(config: RunConfig) -> RunRecord:
    """A record of `config` on a device that cannot train in its precision."""
    record = of(config, log=False, adapter=(), global_step=None, not_run="the device lacks this")
    return dataclasses.replace(record, steps=())


def with_step(record: RunRecord, step: int, /, **changes: Any) -> RunRecord:
    """`record` with fields of its step number `step` replaced."""
    steps = tuple(dataclasses.replace(s, **changes) if s.step == step else s for s in record.steps)
    return dataclasses.replace(record, steps=steps)


def with_steps(record: RunRecord, **changes: Any) -> RunRecord:
    """`record` with fields of every step replaced."""
    return dataclasses.replace(record, steps=tuple(dataclasses.replace(s, **changes) for s in record.steps))


def with_tensor(record: RunRecord, name: str, /, **changes: Any) -> RunRecord:
    """`record` with fields of its trainable tensor `name` replaced."""
    adapter = tuple(dataclasses.replace(t, **changes) if t.name == name else t for t in record.adapter)
    return dataclasses.replace(record, adapter=adapter)


def within(record: RunRecord, part: str, **changes: Any) -> RunRecord:
    """`record` with fields of its `part` (`base`, `round_trip`, `optimizer`, `device`) replaced."""
    return dataclasses.replace(record, **{part: dataclasses.replace(getattr(record, part), **changes)})


def _step(n: int, names: list[str], micro_batches: int, draw: Iterable[float]) -> StepRecord:
    number = iter(draw)
    return StepRecord(
        step=n,
        micro_losses=tuple(next(number) for _ in range(micro_batches)),
        loss=next(number),
        grad_norm=next(number),
        max_abs_gradient=next(number),
        learning_rate=next(number),
        changed=len(names),
        max_update=next(number),
        supervised_tokens=6,
        seconds=next(number),
    )


def _still(step: StepRecord, names: list[str], **changes: Any) -> StepRecord:
    return dataclasses.replace(step, changed=0, unchanged=Names.of(names), max_update=0.0, **changes)


def _line(step: StepRecord) -> LogRecord:
    return LogRecord(step=step.step, loss=step.loss, grad_norm=step.grad_norm, learning_rate=step.learning_rate)


def _tensor(name: str, moved: bool, draw: Iterable[float]) -> TensorRecord:
    number = iter(draw)
    start = 0.0 if name == B else next(number)
    return TensorRecord(
        name=name,
        dtype="float32",
        initial_dtype="float32",
        elements=128,
        initial_norm=start,
        final_norm=next(number) if moved else start,
        delta_norm=next(number) if moved else 0.0,
        changed_fraction=1.0 if moved else 0.0,
    )


def lost() -> RunRecord:
    """A run that lost its CUDA device: its steps are there, and its tensors are out of reach."""
    return healthy(adapter=(), base=None, error=ErrorRecord(stage="train", type="AcceleratorError", message="assert"))
