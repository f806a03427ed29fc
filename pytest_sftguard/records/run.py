"""RunRecord: everything that was seen of one training, as plain numbers, and its file format."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pytest_sftguard.hardware import HardwareProfile
from pytest_sftguard.records.afterwards import BaseAnswersRecord, MergeRecord, ParserRecord
from pytest_sftguard.records.audit import PromptsRecord, SupervisionRecord
from pytest_sftguard.records.context import ContextRecord
from pytest_sftguard.records.decoding import DecodingRecord, GenerationRecord
from pytest_sftguard.records.encoding import RecordError, decode, encode, write_text
from pytest_sftguard.records.evaluation import EvaluationRecord
from pytest_sftguard.records.first_step import FirstStepRecord
from pytest_sftguard.records.looks import LookRecord
from pytest_sftguard.records.migration import from_schema_1
from pytest_sftguard.records.paths import PathsRecord
from pytest_sftguard.records.replay import ReplayRecord
from pytest_sftguard.records.results import AnswerRecord, RoundTripRecord
from pytest_sftguard.records.schedule import ScheduleRecord
from pytest_sftguard.records.training import BaseRecord, LogRecord, OptimizerRecord, StepRecord, TensorRecord
from pytest_sftguard.records.wiring import FoundationRecord, InitialRecord, WiringRecord

SCHEMA = 2
"""Number of the file format; it moves with every change of a field."""


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

    def __str__(self) -> str:
        return f"{self.type}: {self.message}"


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
    observed: bool = False
    """Whether the loop is the user's own: of it only the steps are known, and what was asked for beside them."""
    not_run: str | None = None
    """Why the cell was not trained at all; None if it was."""
    predicted_memory_bytes: int | None = None
    """Peak memory that the cell was expected to need; None where nothing was predicted."""
    error: ErrorRecord | None = None
    """What ended the run early; None if nothing did."""
    compute_dtypes: dict[str, int] = field(default_factory=dict)
    """Result types of the adapted layers' own products in the training's forward passes, with their number."""
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
    looks: tuple[LookRecord, ...] = ()
    """The extra looks that were asked for."""
    wiring: WiringRecord | None = None
    """What takes a gradient; None without the look `wiring`."""
    initial: InitialRecord | None = None
    """The factors before the first step; None without the look `wiring`."""
    foundation: FoundationRecord | None = None
    """The base before the first step; None without the look `wiring`."""
    supervision: SupervisionRecord | None = None
    """The rows' labels; None without the look `supervision`."""
    prompts: PromptsRecord | None = None
    """What generation is given; None without the look `prompts`."""
    schedule: ScheduleRecord | None = None
    """What the learning rate should have been; None if no training began."""
    replay: ReplayRecord | None = None
    """The optimizer's steps in float32; None where nothing was replayed."""
    parser: ParserRecord | None = None
    """How the target reads answers; None where it is asked no questions."""
    base_answers: BaseAnswersRecord | None = None
    """The base's answers to the same questions; None where they were not looked at."""
    merge: MergeRecord | None = None
    """The adapter merged into its base; None where it was not looked at."""
    context: ContextRecord | None = None
    """Rows alone, padded and packed, of the look `context`."""
    paths: PathsRecord | None = None
    """One micro-batch on the training's way and on plain ones, of the look `paths`."""
    evaluation: EvaluationRecord | None = None
    """Raw losses of the evaluation set, of the look `evaluation`."""
    generation: GenerationRecord | None = None
    """The scores that the answers were decoded from; None where nothing was asked."""
    decoding: DecodingRecord | None = None
    """Answers in a batch and alone, of the look `decoding`."""
    adapter_digest: str = ""
    """Digest of the bits of every trainable tensor after the last step; empty where none was seen."""
    first_step: FirstStepRecord | None = None
    """The first step's forward passes; None if there was none."""
    replica_digests: tuple[str, ...] = ()
    """The same of each process, where several trained one model."""
    seconds: float | None = None
    """Wall time of the whole cell, from building to the last answer."""
    variant: str = ""
    """What sets this run apart from its cell's own, where it is a reference for it: `rerun`, `resumed`, ..."""

    @property
    def adapter_out_of_reach(self) -> bool:
        """Whether steps saw trainable tensors that nobody could look at afterwards: the device was lost to an error."""
        seen = any(s.changed or s.unchanged for s in self.steps)
        return self.error is not None and not self.adapter and seen

    @property
    def taken_steps(self) -> list[StepRecord]:
        """The steps that the loss scaler did not skip; a skipped one may have any gradient, and changes nothing."""
        return [s for s in self.steps if not s.skipped]

    @property
    def losses(self) -> list[float]:
        """Raw loss of every step; NaN where none was seen."""
        return [math.nan if s.loss is None else s.loss for s in self.steps]

    @property
    def grad_norms(self) -> list[float]:
        """Unclipped gradient norm of every step; NaN where none was seen."""
        return [math.nan if s.grad_norm is None else s.grad_norm for s in self.steps]

    def look(self, name: str) -> LookRecord | None:
        """What became of the extra look called `name`; None where it was not asked for."""
        return next((look for look in self.looks if look.name == name), None)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types; `from_dict` takes it back without loss."""
        encoded: dict[str, Any] = encode(self)
        return encoded

    @classmethod
    def from_dict(cls, data: Any) -> RunRecord:
        """Read what `to_dict` wrote; a RecordError names the first thing that does not fit."""
        if not isinstance(data, dict) or "schema" not in data:
            raise RecordError("this is no run record: it is not an object with a schema number")
        if data["schema"] == 1:
            data = from_schema_1(data)
        if data["schema"] != SCHEMA:
            raise RecordError(
                f"the record has schema {data['schema']!r}, this version reads {SCHEMA}: run the cell again"
            )
        record: RunRecord = decode(cls, data, "record")
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
