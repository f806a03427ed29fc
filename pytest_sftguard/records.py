"""RunRecord: everything that was seen of one training, as plain numbers, and its file format.

A record knows nothing of torch. Numbers that are not finite are kept as they are (`nan`, `inf`) and written to JSON
as the strings "nan", "inf" and "-inf", because JSON has no such numbers; a value that was not seen is `None`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import types
import typing
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pytest_sftguard.hardware import HardwareProfile

SCHEMA = 1
"""Number of the file format; it moves with every change of a field."""

_NAMES_KEPT = 1024
"""More than a large model has trainable tensors, so that a list is whole, and a file bounded."""


class RecordError(ValueError):
    """A file or text that is no record of this schema; the message says what is wrong with it."""


@dataclass(frozen=True)
class Names:
    """A count of tensors, and their names."""

    count: int = 0
    """How many there are."""
    first: tuple[str, ...] = ()
    """Their names, 1,024 at the most."""

    @classmethod
    def of(cls, names: Iterable[str]) -> Names:
        """Count `names` and keep them, up to the bound."""
        every = tuple(names)
        return cls(len(every), every[:_NAMES_KEPT])

    def __bool__(self) -> bool:
        return self.count != 0

    def __str__(self) -> str:
        if not self.first:
            return f"{self.count} tensors"
        more = self.count - 1
        return self.first[0] + (f" and {more} more" if more > 0 else "")


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One optimizer step, seen at the source."""

    step: int
    """Number of the step, from 1."""
    micro_losses: tuple[float, ...] = ()
    """Loss of each micro-batch as `compute_loss` returned it, before any filter."""
    loss: float | None = None
    """The step's loss: the sum of what `training_step` returned over the micro-batches."""
    grad_norm: float | None = None
    """Global L2 norm of the unscaled gradients, before clipping."""
    max_abs_gradient: float | None = None
    """Largest absolute entry of the unscaled gradients, before clipping."""
    nonfinite_gradients: Names = Names()
    """Trainable tensors whose gradient holds NaN or infinity."""
    missing_gradients: Names = Names()
    """Trainable tensors without a gradient."""
    zero_gradients: Names = Names()
    """Trainable tensors whose gradient is exactly zero."""
    learning_rate: float | None = None
    """Learning rate that the step used (of the first parameter group)."""
    loss_scale: float | None = None
    """Loss scale that the gradients were computed under; None without a scaler."""
    loss_scale_after: float | None = None
    """Loss scale after the scaler's update; None without a scaler."""
    changed: int | None = None
    """Number of trainable tensors that changed and hold finite numbers only."""
    unchanged: Names = Names()
    """Trainable tensors that are bit for bit what they were before the step."""
    idle: Names = Names()
    """Trainable tensors of layers that no token passed through in the step, such as those of an expert not chosen."""
    stale_gradients: Names = Names()
    """Trainable tensors that held a gradient other than zero when the step began: one that no zero_grad cleared."""
    max_change_before: float | None = None
    """Largest absolute change of a trainable element from the end of the step before to this one's gradients."""
    nonfinite_weights: Names = Names()
    """Trainable tensors that hold NaN or infinity after the step."""
    nonfinite_moments: Names = Names()
    """Optimizer states that hold NaN or infinity after the step, as `parameter:state`."""
    max_update: float | None = None
    """Largest absolute change of a trainable element in the step."""
    supervised_tokens: int | None = None
    """Labels of the step that count after the shift; None where the batches hold no labels."""
    seconds: float | None = None
    """Wall time from the start of the first micro-batch to the end of the optimizer step."""
    peak_memory_bytes: int | None = None
    """Peak of the device allocator in the step; None on a CPU."""

    @property
    def effect(self) -> str:
        """What the step did: `applied`, `skipped_by_scaler`, `poisoned`, `no_effect`, or `unknown`.

        Decided by what happened to the tensors, never by a library's flag: accelerate reports no step as skipped
        where the optimizer is fused (accelerate#4242).
        """
        if self.nonfinite_weights or self.nonfinite_moments:
            return "poisoned"
        if self.changed is None:
            return "unknown"
        if self.changed > 0:
            return "applied"
        if self.scale_fell:
            return "skipped_by_scaler"
        return "no_effect"

    @property
    def scale_fell(self) -> bool:
        """Whether the scaler answered this step by backing off."""
        if self.loss_scale is None or self.loss_scale_after is None:
            return False
        return self.loss_scale_after < self.loss_scale

    @property
    def gradients_finite(self) -> bool:
        """Whether every gradient of the step, and their norm, was seen and is finite."""
        return self.grad_norm is not None and math.isfinite(self.grad_norm) and not self.nonfinite_gradients


@dataclass(frozen=True, kw_only=True)
class LogRecord:
    """One line of the Trainer's own log: what the user was shown. Nothing is decided by it."""

    step: int
    """`global_step` of the line."""
    loss: float | None = None
    """Logged `loss`."""
    grad_norm: float | None = None
    """Logged `grad_norm`."""
    learning_rate: float | None = None
    """Logged `learning_rate`."""


@dataclass(frozen=True, kw_only=True)
class TensorRecord:
    """One trainable tensor over the whole run."""

    name: str
    """Name of the parameter in the model."""
    dtype: str
    """Type it is stored in, a torch dtype name."""
    elements: int
    """Number of elements."""
    initial_norm: float | None = None
    """L2 norm before the first step; 0 for a factor that starts at zero, as `lora_B` does."""
    final_norm: float | None = None
    """L2 norm after the last step."""
    delta_norm: float | None = None
    """L2 norm of (after - before); NaN where the tensor is not finite."""
    changed_fraction: float | None = None
    """Share of the elements that are finite, and that any step changed: steps by the sign return to their start."""
    partial: bool = False
    """Whether a step may leave elements out: the factors of all experts of a block are one tensor."""

    @property
    def is_factor(self) -> bool:
        """Whether this is a low-rank factor of a linear layer, of which every element takes part in every product."""
        return not self.partial and any(part in ("lora_A", "lora_B") for part in self.name.split("."))


@dataclass(frozen=True, kw_only=True)
class OptimizerRecord:
    """The optimizer as it was after the run."""

    name: str
    """Class name, such as `AdamW`."""
    fused: bool = False
    """Whether it steps in one fused kernel."""
    eps: float | None = None
    """The `eps` of the first group, where it has one."""
    weight_decay: float | None = None
    """The `weight_decay` of the first group, where it has one."""
    state_dtypes: tuple[str, ...] = ()
    """Types of its floating-point states of more than one element."""
    owns_trainables: bool | None = None
    """Whether its parameters are exactly the trainable ones."""


@dataclass(frozen=True, kw_only=True)
class BaseRecord:
    """The tensors that must not change: every parameter and buffer that is not part of the adapter."""

    tensors: int
    """How many there are."""
    digest_before: str
    """Digest of all of them before the first step."""
    digest_after: str
    """The same after the last step."""
    changed: Names = Names()
    """Those whose bits differ."""
    rewritten: Names = Names()
    """Buffers outside the state dict that the model's own forward pass rewrites; they are not held to their start."""
    trainable: Names = Names()
    """Those that have `requires_grad`, though they are not part of the adapter."""


@dataclass(frozen=True, kw_only=True)
class RoundTripRecord:
    """The adapter's way into a file and back onto a fresh base."""

    file_bytes: int
    """Size of the adapter's weight file."""
    tensors: int
    """Tensors in the file."""
    missing: Names = Names()
    """Tensors of the adapter that the file lacks, or holds in another shape."""
    unexpected: Names = Names()
    """Tensors in the file that the adapter does not have."""
    nonfinite: Names = Names()
    """Tensors in the file that hold NaN or infinity."""
    zero: Names = Names()
    """Low-rank factors in the file that are zero throughout, so that their layer is the base's."""
    differing: Names = Names()
    """Tensors that are not the same bits in the trained model and in the reloaded one."""
    load_warnings: tuple[str, ...] = ()
    """Warnings of the load that speak of missing, unexpected or mismatched tensors."""
    fresh_base_digest: str = ""
    """Digest of the fresh base that the adapter was loaded onto."""
    restored: bool = False
    """Whether that base was put together again by merging, as pissa and its like take their factors out of it."""
    max_abs_logit: float | None = None
    """Largest absolute logit of the trained model on the probe batch."""
    max_logit_change: float | None = None
    """Largest absolute difference between the trained and the reloaded model's logits."""
    max_logit_effect: float | None = None
    """Largest absolute difference between the reloaded model's logits with and without its adapter."""


@dataclass(frozen=True, kw_only=True)
class AnswerRecord:
    """One answer of the reloaded adapter, generated greedily."""

    prompt: str
    """What the model was given."""
    text: str
    """What came back, the seeded prefix included."""
    expected: float
    """The number that would be right."""
    parsed: float | None = None
    """The number that the target's `parse_answer` read, or None."""

    @property
    def is_number(self) -> bool:
        """Whether a finite number was read."""
        return self.parsed is not None and math.isfinite(self.parsed)


@dataclass(frozen=True, kw_only=True)
class ErrorRecord:
    """An exception that ended the run early."""

    stage: str
    """What was being done: `build`, `train`, `round_trip` or `answers`."""
    type: str
    """Class of the exception."""
    message: str
    """The first line of its text."""
    where: str = ""
    """File, line and function that raised it."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One training run of one cell."""

    schema: int = SCHEMA
    """Number of the format."""
    cell: str
    """The cell's id, such as `bf16-mixed-b4x2`."""
    precision: str
    """Name of the precision mode that was asked for."""
    per_device_train_batch_size: int
    """Rows in one micro-batch."""
    gradient_accumulation_steps: int
    """Micro-batches per optimizer step."""
    max_steps: int
    """Optimizer steps that were asked for."""
    seed: int
    """Seed of weights, data order and dropout."""
    target: str
    """Dotted path of the code under test."""
    model: str | None = None
    """Model that the target was asked to load; None: its own default."""
    device: HardwareProfile
    """The machine that the run was on."""
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of Python and of the libraries."""
    not_run: str | None = None
    """Why the cell was not trained at all; None if it was."""
    error: ErrorRecord | None = None
    """What ended the run early; None if nothing did."""
    compute_dtypes: dict[str, int] = field(default_factory=dict)
    """Result types of the adapted layers' products in each step's first micro-batch, with the number of layers."""
    weights_dtypes: dict[str, int] = field(default_factory=dict)
    """Types of the adapted layers' frozen weights, with the number of layers; quantised ones by their storage."""
    autocast_dtype: str | None = None
    """Autocast's type in the first micro-batch; None without autocast."""
    loss_scaling: bool = False
    """Whether gradients were produced under a loss scaler."""
    tf32: bool | None = None
    """Whether float32 matrix products were allowed to run in tf32; None where the device has no such thing."""
    optimizer: OptimizerRecord | None = None
    """The optimizer; None if none was made."""
    max_grad_norm: float | None = None
    """Clipping threshold; None or 0: no clipping."""
    steps: tuple[StepRecord, ...] = ()
    """Every optimizer step, in order."""
    log: tuple[LogRecord, ...] = ()
    """What the Trainer logged."""
    global_step: int | None = None
    """The Trainer's own count of steps at the end."""
    micro_batches_per_epoch: int | None = None
    """Length of the training data loader; None for a stream."""
    adapter: tuple[TensorRecord, ...] = ()
    """Every trainable tensor."""
    base: BaseRecord | None = None
    """The frozen tensors."""
    round_trip: RoundTripRecord | None = None
    """Saving and reloading; None if it was not reached."""
    questions: int = 0
    """Questions that were asked, so that as many answers must be there."""
    answers: tuple[AnswerRecord, ...] = ()
    """Answers of the reloaded adapter."""
    seconds: float | None = None
    """Wall time of the whole cell, from building to the last answer."""

    @property
    def losses(self) -> list[float]:
        """Raw loss of every step; NaN where none was seen."""
        return [math.nan if s.loss is None else s.loss for s in self.steps]

    @property
    def grad_norms(self) -> list[float]:
        """Unclipped gradient norm of every step; NaN where none was seen."""
        return [math.nan if s.grad_norm is None else s.grad_norm for s in self.steps]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types; `from_dict` takes it back without loss."""
        encoded: dict[str, Any] = _encode(self)
        return encoded

    @classmethod
    def from_dict(cls, data: Any) -> RunRecord:
        """Read what `to_dict` wrote; a RecordError names the first thing that does not fit."""
        if not isinstance(data, dict) or "schema" not in data:
            raise RecordError("this is no run record: it is not an object with a schema number")
        if data["schema"] != SCHEMA:
            raise RecordError(
                f"the record has schema {data['schema']!r}, this version reads {SCHEMA}: run the cell again"
            )
        record: RunRecord = _decode(cls, data, "record")
        return record

    def write(self, path: Path) -> None:
        """Write the record as JSON, whole or not at all; OSError as the file system gives it."""
        write_text(path, json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")

    @classmethod
    def read(cls, path: Path) -> RunRecord:
        """Read a file that `write` wrote; a RecordError names the file and what is wrong with it."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise RecordError(f"{path}: cannot be read as a record: {error}") from error
        try:
            return cls.from_dict(data)
        except RecordError as error:
            raise RecordError(f"{path}: {error}") from error


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all: a temporary file beside it takes its place at the end."""
    temporary = path.with_name(f".{path.name[:40]}.{uuid.uuid4().hex}")  # mkstemp's would be unreadable for others
    try:
        with open(temporary, "x", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def numbers(value: Any, where: str = "") -> Iterable[tuple[str, float]]:
    """Every float in a record, with the path to it, for example `steps[2].loss`."""
    if isinstance(value, float):
        yield where, value
    elif dataclasses.is_dataclass(value):
        for f in dataclasses.fields(value):
            yield from numbers(getattr(value, f.name), f"{where}.{f.name}" if where else f.name)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from numbers(item, f"{where}[{key}]")
    elif isinstance(value, tuple):
        for i, item in enumerate(value):
            yield from numbers(item, f"{where}[{i}]")


def _encode(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if dataclasses.is_dataclass(value):
        return {f.name: _encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: _encode(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_encode(item) for item in value]
    return value


def _decode(kind: Any, data: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if data is None:
            return None
        return _decode(next(a for a in arguments if a is not type(None)), data, where)
    if origin is tuple:
        _expect(isinstance(data, list), where, "a list", data)
        return tuple(_decode(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(data))
    if origin is dict:
        _expect(isinstance(data, dict), where, "an object", data)
        return {key: _decode(arguments[1], item, f"{where}[{key}]") for key, item in data.items()}
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, data, where)
    return _decode_plain(kind, data, where)


def _decode_dataclass(kind: Any, data: Any, where: str) -> Any:
    _expect(isinstance(data, dict), where, "an object", data)
    hints = typing.get_type_hints(kind)
    unknown = set(data) - set(hints)
    if unknown:
        raise RecordError(f"{where}: unknown field {', '.join(sorted(map(str, unknown)))}")
    try:
        return kind(**{name: _decode(hints[name], item, f"{where}.{name}") for name, item in data.items()})
    except (TypeError, ValueError) as error:
        if isinstance(error, RecordError):
            raise
        raise RecordError(f"{where}: {str(error).removeprefix(f'{kind.__name__}.__init__() ')}") from error


def _decode_plain(kind: Any, data: Any, where: str) -> Any:
    if kind is float:
        if isinstance(data, str) and data in ("nan", "inf", "-inf"):
            return float(data)
        _expect(isinstance(data, (int, float)) and not isinstance(data, bool), where, "a number", data)
        try:
            return float(data)
        except OverflowError:
            raise RecordError(f"{where}: expected a number that a float can hold, found one that is larger") from None
    checks: dict[Any, Callable[[Any], bool]] = {
        int: lambda d: isinstance(d, int) and not isinstance(d, bool),
        str: lambda d: isinstance(d, str),
        bool: lambda d: isinstance(d, bool),
    }
    _expect(checks[kind](data), where, f"a value of type {kind.__name__}", data)
    return data


def _expect(condition: bool, where: str, wanted: str, data: Any) -> None:
    if not condition:
        raise RecordError(f"{where}: expected {wanted}, found {str(data)[:60]!r}")
