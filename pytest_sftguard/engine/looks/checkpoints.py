"""A checkpoint of the optimizer and the schedule, saved and loaded by the Trainer's own methods after the training."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pytest_sftguard.engine.looks import InapplicableError, Look
from pytest_sftguard.engine.stages import Trained
from pytest_sftguard.records import CheckpointRecord, Names

LARGEST = 512 * 2**20
"""Largest state of an optimizer that is saved and loaded in every run, in bytes. Adam's states of an adapter of rank 16
on all linear layers of 7 billion parameters take 320 MB. Saving and loading 512 MiB took 3 s on two busy cores,
where a step of such a model takes longer."""
_FILES = 1.2
"""Free space that a checkpoint needs, as a multiple of the state."""
_SHARDED = {
    "is_deepspeed_enabled": "DeepSpeed keeps the optimizer's state, and saves it with the model",
    "is_fsdp_enabled": "the optimizer's state is sharded by FSDP, and saved with the model",
    "is_fsdp_xla_v1_enabled": "the optimizer's state is sharded by FSDP, and saved with the model",
}
_MISSING = object()


class Checkpoints(Look[Trained]):
    """Saves and loads the optimizer's state, unless it is large; then puts back what was in memory."""

    def conclude(self, reached: Trained) -> dict[str, Any]:
        """Compare the state after loading with the state before."""
        if (size := size_of(reached.trainer)) > LARGEST:
            mib = 2**20
            raise InapplicableError(
                f"the optimizer's state has {size // mib} MiB, more than the {LARGEST // mib} MiB that are saved and"
                " loaded in every run: the look `large_checkpoints` of the tier standard does it"
            )
        return {"checkpoint": compared(reached, size)}


def size_of(trainer: Any) -> int:
    """Size of the optimizer's state in bytes. Raises InapplicableError where no checkpoint would hold it as it is."""
    for name, why in _SHARDED.items():
        if getattr(trainer, name, False):
            raise InapplicableError(why)
    if trainer.args.world_size > 1:
        raise InapplicableError("several processes save one checkpoint")
    if trainer.args.save_only_model:
        raise InapplicableError("save_only_model: the checkpoints of this training hold no optimizer state")
    optimizer = _unwrapped(trainer.optimizer)
    if not isinstance(optimizer, torch.optim.Optimizer) or "state" not in vars(optimizer):
        raise InapplicableError(f"the state of {type(optimizer).__name__} is not that of a torch.optim.Optimizer")
    if trainer.lr_scheduler is None:
        raise InapplicableError(
            "the training has no schedule, and transformers loads an optimizer's state only with one"
        )
    return sum(t.numel() * t.element_size() for t in _tensors(optimizer.state))


def compared(reached: Trained, size: int) -> CheckpointRecord:
    """What a checkpoint gives back, of a state of `size` bytes. Raises InapplicableError where the disk is full."""
    trainer: Any = reached.trainer
    folder = reached.folder / "checkpoint"
    folder.mkdir()
    if (free := shutil.disk_usage(folder).free) < _FILES * size:
        raise InapplicableError(f"a checkpoint of {size / 1e9:.1f} GB does not fit into the {free / 1e9:.1f} GB left")
    optimizer = _unwrapped(trainer.optimizer)
    names = {id(p): n for n, p in reached.recorder.model.named_parameters()}
    states, values = _states(optimizer, names), _values(trainer)
    try:
        _save(trainer, folder)
        with _blank(trainer):
            trainer._load_optimizer_and_scheduler(str(folder))
            if trainer.accelerator.scaler is not None:
                trainer._load_scaler(str(folder))
            loaded, loaded_values = _states(optimizer, names), _values(trainer)
            record = _compared(states, loaded, CheckpointRecord(optimizer=type(optimizer).__name__, size_bytes=size))
            found = _other_values(values, loaded_values)
    finally:
        shutil.rmtree(folder)
    return _with(record, values=len(values), **found)


def _save(trainer: Any, folder: Path) -> None:
    trainer._save_optimizer_and_scheduler(str(folder))
    if trainer.accelerator.scaler is not None:
        trainer._save_scaler(str(folder))


@contextlib.contextmanager
def _blank(trainer: Any) -> Iterator[None]:
    """Make optimizer, schedule and scaler as a new process has them, and put back what they hold at the end.

    A checkpoint that is not loaded at all would otherwise go unnoticed.
    """
    optimizer, schedule, scaler = (
        _unwrapped(trainer.optimizer),
        _plain(trainer.lr_scheduler),
        trainer.accelerator.scaler,
    )
    held = [(o, dict(vars(o))) for o in (optimizer, schedule, scaler) if o is not None]
    schedule_state = copy.deepcopy(schedule.state_dict())
    scaler_tensors = {k: v.clone() for k, v in vars(scaler).items() if isinstance(v, Tensor)} if scaler else {}
    optimizer.state = defaultdict(dict)
    optimizer.param_groups = [{**g, "lr": g.get("initial_lr", g.get("lr"))} for g in optimizer.param_groups]
    if isinstance(getattr(schedule, "last_epoch", None), int):
        schedule.last_epoch = 0
    if scaler is not None and "scale" in (state := scaler.state_dict()):
        scaler.load_state_dict({**state, "scale": 1.0, "_growth_tracker": 0})
    try:
        yield
    finally:
        # a chain of schedules holds others
        schedule.load_state_dict(schedule_state)
        for owner, attributes in held:
            vars(owner).clear()
            vars(owner).update(attributes)
        for name, value in scaler_tensors.items():
            vars(scaler)[name].copy_(value)


def _unwrapped(optimizer: Any) -> Any:
    """The optimizer that accelerate has wrapped."""
    return getattr(optimizer, "optimizer", optimizer)


def _plain(schedule: Any) -> Any:
    return getattr(schedule, "scheduler", schedule)


def _tensors(value: Any) -> Iterator[Tensor]:
    yield from (leaf for _, leaf in _leaves(value) if isinstance(leaf, Tensor))


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Everything in nested dicts, lists and tuples, with its path."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            yield from _leaves(inner, f"{path}.{i}" if path else str(i))
    else:
        yield path, value


def _states(optimizer: Any, names: Mapping[int, str]) -> dict[str, tuple[Any, torch.dtype]]:
    """Every state of the optimizer, as `parameter:state`, with the type of its parameter."""
    found: dict[str, tuple[Any, torch.dtype]] = {}
    for g, group in enumerate(optimizer.param_groups):
        for i, parameter in enumerate(group["params"]):
            name = names.get(id(parameter), f"parameter {i} of group {g}")
            for key, value in _leaves(optimizer.state.get(parameter, {})):
                found[f"{name}:{key}"] = value, parameter.dtype
    return found


def _values(trainer: Any) -> dict[str, Any]:
    """Options of each group, and the state of the schedule and of the loss scaler, by name."""
    found: dict[str, Any] = {}
    for g, group in enumerate(_unwrapped(trainer.optimizer).param_groups):
        options = {k: v for k, v in group.items() if k not in ("params", "param_names")}
        found |= {f"{k} of group {g}": _number(v) for k, v in _leaves(options)}
    scaler = trainer.accelerator.scaler
    for owner, state in (
        ("schedule", trainer.lr_scheduler.state_dict()),
        ("loss scaler", {} if scaler is None else scaler.state_dict()),
    ):
        found |= {f"{k} of the {owner}": _number(v) for k, v in _leaves(state)}
    # a function or an object of somebody's own has no value to compare
    plain = (bool, int, float, complex, str, bytes, type(None))
    return {k: v for k, v in found.items() if isinstance(v, plain)}


def _number(value: Any) -> Any:
    """A tensor of one element as a number, so that a rate is the same in either form."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    return value


def _other_values(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    other = [n for n, v in before.items() if not _equal(v, after.get(n, _MISSING))]
    if not other:
        return {}
    got = after.get(other[0], _MISSING)
    return {
        "other_values": Names.of(other),
        "other_expected": repr(before[other[0]])[:80],
        "other_got": "nothing" if got is _MISSING else repr(got)[:80],
    }


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float) and math.isnan(one):
        return math.isnan(other)
    return bool(one == other)


def _compared(
    before: dict[str, tuple[Any, torch.dtype]], after: dict[str, tuple[Any, torch.dtype]], record: CheckpointRecord
) -> CheckpointRecord:
    changed, narrowed, unread, tensors = [], [], [], 0
    worst, farthest = "", -1.0
    for name, (value, dtype) in before.items():
        if name not in after:
            continue
        got = after[name][0]
        if any(isinstance(v, Tensor) and type(v) not in (Tensor, nn.Parameter) for v in (value, got)):
            unread.append(name)
            continue
        tensors += isinstance(value, Tensor)
        if _same(value, got):
            continue
        # torch loads a state of floating-point numbers in the type of its parameter
        if isinstance(value, Tensor) and value.is_floating_point() and _same(value.to(dtype), got):
            narrowed.append(name)
            continue
        changed.append(name)
        distance = _distance(value, got)
        if not distance <= farthest:
            worst, farthest = name, math.inf if math.isnan(distance) else distance
    record = _with(
        record,
        tensors=tensors,
        changed=Names.of(changed),
        narrowed=Names.of(narrowed),
        unread=Names.of(unread),
        lost=Names.of(n for n in before if n not in after),
        added=Names.of(n for n in after if n not in before),
    )
    return _with(record, worst=worst, **_worst(before[worst][0], after[worst][0])) if worst else record


def _same(one: Any, other: Any) -> bool:
    """Whether two states are the same bits; a number may have become a tensor."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.dtype != other.dtype or one.shape != other.shape:
            return False
        return torch.equal(_bits(one), _bits(other).to(one.device))
    return _equal(_number(one), _number(other))


def _bits(tensor: Tensor) -> Tensor:
    dense = tensor.detach().to_dense() if tensor.is_sparse else tensor.detach()
    return dense.contiguous().reshape(-1).view(torch.uint8)


def _distance(one: Any, other: Any) -> float:
    pair = _numbers(one, other)
    if pair is None:
        return math.inf
    return float((pair[1] - pair[0]).norm() / pair[0].norm().clamp_min(torch.finfo(torch.float32).tiny))


def _worst(one: Any, other: Any) -> dict[str, Any]:
    pair = _numbers(one, other)
    if pair is None:
        return {}
    at = int((pair[1] - pair[0]).abs().nan_to_num(nan=math.inf).argmax())
    expected, got = float(pair[0][at]), float(pair[1][at])
    return {"distance": _distance(one, other), "expected": expected, "got": got}


def _numbers(one: Any, other: Any) -> tuple[Tensor, Tensor] | None:
    """Both states as vectors of float32 on the host; None where they cannot be subtracted."""
    if not all(isinstance(v, (Tensor, int, float)) for v in (one, other)):
        return None
    vectors = [torch.as_tensor(v).detach() for v in (one, other)]
    first, second = ((v.to_dense() if v.is_sparse else v).float().cpu().reshape(-1) for v in vectors)
    return (first, second) if first.shape == second.shape and len(first) else None


def _with(record: CheckpointRecord, **changes: Any) -> CheckpointRecord:
    return dataclasses.replace(record, **changes)
