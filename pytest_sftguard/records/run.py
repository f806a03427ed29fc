"""RunRecord: everything that was seen of one training, as plain numbers, and its file format."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pytest_sftguard.hardware import HardwareProfile
from pytest_sftguard.records.answers import (
    AnsweringRecord,
    AnswerRecord,
    BaseAnswersRecord,
    DecodingRecord,
    FollowingRecord,
    GenerationRecord,
    ParserRecord,
)
from pytest_sftguard.records.checkpoint import CheckpointRecord
from pytest_sftguard.records.comparisons import ContextRecord, MergeRecord, PathsRecord, RoundTripRecord
from pytest_sftguard.records.encoding import RecordError, decode, encode, read_json, write_text
from pytest_sftguard.records.micro_batch import AimRecord, DerivativeRecord, FootprintRecord, FutureRecord
from pytest_sftguard.records.migration import from_schema_1
from pytest_sftguard.records.rows import (
    ArrivalRecord,
    BatchesRecord,
    EvaluationRecord,
    KeptRecord,
    PromptsRecord,
    SupervisionRecord,
)
from pytest_sftguard.records.steps import (
    EntropyRecord,
    FirstStepRecord,
    LogRecord,
    ReplayRecord,
    ScheduleRecord,
    StepRecord,
)
from pytest_sftguard.records.tensors import (
    BaseRecord,
    FoundationRecord,
    InitialRecord,
    Names,
    OptimizerRecord,
    TensorRecord,
    WiringRecord,
)
from pytest_sftguard.records.watching import BaseDuringRecord, RandomnessRecord, ReachRecord

SCHEMA = 2
"""Number of the file format; it changes whenever a field does."""


@dataclass(frozen=True, kw_only=True)
class ErrorRecord:
    """An exception that ended the run early."""

    stage: str
    """Stage of the run: `build`, `train`, `round_trip` or `answers`."""
    type: str
    """Class of the exception."""
    message: str
    """First line of its text."""
    where: str = ""
    """File, line and function that raised it."""
    guards_own: bool = False
    """Whether code of the guard's own raised it, so that it says nothing about the training."""

    def __str__(self) -> str:
        return f"{self.type}: {self.message}"


@dataclass(frozen=True, kw_only=True)
class LookRecord:
    """One extra look of the engine, and how it ended."""

    name: str
    """Name of its file in `engine/looks`."""
    inapplicable: str = ""
    """Why the look does not apply here, such as a target without questions; empty if it does."""
    error: str = ""
    """The exception that it raised, as `Type: message`; empty if it raised none."""

    @property
    def done(self) -> bool:
        """Whether it ran to its end."""
        return not self.inapplicable and not self.error


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One training run of one cell."""

    schema: int = SCHEMA
    """Number of the file format."""
    cell: str
    """The cell's id, such as `bf16-mixed-b4x2`."""
    precision: str
    """Name of the requested precision mode."""
    per_device_train_batch_size: int
    """Rows in one micro-batch."""
    gradient_accumulation_steps: int
    """Micro-batches per optimizer step."""
    max_steps: int
    """Number of requested optimizer steps."""
    seed: int
    """Seed of weights, data order and dropout."""
    target: str
    """Dotted path of the code under test."""
    model: str | None = None
    """Model that the target was asked to load; None for its own default."""
    device: HardwareProfile
    """The device of the run."""
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of Python and of the libraries."""
    observed: bool = False
    """Whether the loop is the user's own, so that only its steps and what the user said about it are known."""
    not_run: str | None = None
    """Why the cell was not trained; None if it was."""
    predicted_memory_bytes: int | None = None
    """Predicted peak memory of the cell; None if none was predicted."""
    error: ErrorRecord | None = None
    """Exception that ended the run early; None if none did."""
    compute_dtypes: dict[str, int] = field(default_factory=dict)
    """Result types of the adapted layers' own products in the training's forward passes, with the number of layers."""
    weights_dtypes: dict[str, int] = field(default_factory=dict)
    """Types of the adapted layers' frozen weights, with the number of layers; storage types if they are quantised."""
    autocast_dtype: str | None = None
    """Autocast's type in the first micro-batch; None without autocast."""
    loss_scaling: bool = False
    """Whether gradients were computed under a loss scaler."""
    tf32: bool | None = None
    """Whether float32 matrix products were allowed to run in tf32; None if the device has no tf32."""
    optimizer: OptimizerRecord | None = None
    """The optimizer; None if none was created."""
    max_grad_norm: float | None = None
    """Clipping threshold; None or 0 for no clipping."""
    steps: tuple[StepRecord, ...] = ()
    """Every optimizer step, in order."""
    log: tuple[LogRecord, ...] = ()
    """The Trainer's own log."""
    global_step: int | None = None
    """The Trainer's own count of steps at the end."""
    stopped: bool = False
    """Whether transformers' early stopping ended the training, after as many evaluations as its patience says."""
    restored: bool = False
    """Whether the Trainer has put the weights of its best checkpoint back at the end."""
    micro_batches_per_epoch: int | None = None
    """Length of the training data loader; None for a stream."""
    adapter_type: str | None = None
    """Type of the adapter as peft names it, such as `LORA`; empty for a model that trains without an adapter, None if
    that is not known."""
    adapter: tuple[TensorRecord, ...] = ()
    """Every trainable tensor."""
    base: BaseRecord | None = None
    """The frozen tensors."""
    round_trip: RoundTripRecord | None = None
    """The adapter saved and reloaded; None if the run did not get that far."""
    questions: int = 0
    """Number of questions that were asked, and so of the answers that must be there."""
    answers: tuple[AnswerRecord, ...] = ()
    """Answers of the reloaded adapter."""
    looks: tuple[LookRecord, ...] = ()
    """The requested extra looks."""
    wiring: WiringRecord | None = None
    """The trainable tensors; None without the look `wiring`."""
    initial: InitialRecord | None = None
    """The factors before the first step; None without the look `wiring`."""
    foundation: FoundationRecord | None = None
    """The base before the first step; None without the look `wiring`."""
    supervision: SupervisionRecord | None = None
    """The labels of the rows; None without the look `supervision`."""
    batches: BatchesRecord | None = None
    """The rows of the micro-batches; None without the look `batches`."""
    arrival: ArrivalRecord | None = None
    """The rows of the data set in the micro-batches; None without the look `arrival`."""
    randomness: RandomnessRecord | None = None
    """The random numbers of the training's forward passes; None without the look `randomness`."""
    base_during: BaseDuringRecord | None = None
    """The base inside `train()`; None without the look `base_during`."""
    reach: ReachRecord | None = None
    """The adapted layers that a token passed through; None without the look `reach`."""
    checkpoint: CheckpointRecord | None = None
    """A checkpoint saved and loaded; None without the look `checkpoints`."""
    prompts: PromptsRecord | None = None
    """The prompts of generation; None without the look `prompts`."""
    schedule: ScheduleRecord | None = None
    """The learning rates that the schedule prescribes; None if no training began."""
    replay: ReplayRecord | None = None
    """The optimizer's steps in float32; None if none were replayed."""
    parser: ParserRecord | None = None
    """How the target parses answers; None if it was asked no questions."""
    base_answers: BaseAnswersRecord | None = None
    """The base's answers to the same questions; None without the look `base_answers`."""
    merge: MergeRecord | None = None
    """The adapter merged into its base; None without the look `merging`."""
    context: ContextRecord | None = None
    """Rows alone, padded and packed; None without the look `context`."""
    paths: PathsRecord | None = None
    """One micro-batch on the training's path and on plain ones; None without the look `paths`."""
    derivative: DerivativeRecord | None = None
    """The gradient of one micro-batch against differences of its loss; None without the look `first_batch`."""
    later_derivatives: tuple[DerivativeRecord, ...] = ()
    """The same for a micro-batch of each of the last two steps, at the trained weights."""
    footprint: FootprintRecord | None = None
    """The places that its loss depends on; None without the look `first_batch`."""
    aim: AimRecord | None = None
    """The direction in which its loss pulls; None without the look `first_batch`."""
    future: FutureRecord | None = None
    """Tokens whose later tokens were changed; None without the look `first_batch`."""
    evaluation: EvaluationRecord | None = None
    """Raw losses of the evaluation set; None without the look `evaluation`."""
    generation: GenerationRecord | None = None
    """The scores from which the answers were decoded; None if no question was asked."""
    following: FollowingRecord | None = None
    """The answers against one forward pass; None without the look `following`."""
    decoding: DecodingRecord | None = None
    """Answers in a batch and alone; None without the look `decoding`."""
    answering: AnsweringRecord | None = None
    """What the target's own `generate` does; None without the look `answering`."""
    kept: KeptRecord | None = None
    """The checkpoint that is kept as the best; None without the look `kept_checkpoint`, or where none is chosen."""
    adapter_digest: str = ""
    """Digest of the bits of every trainable tensor after the last step; empty if none was seen."""
    first_step: FirstStepRecord | None = None
    """The forward passes of the first step; None if there was none."""
    entropies: tuple[EntropyRecord, ...] = ()
    """The cross-entropy of the logits in the steps after the first; empty where the model itself computes the loss."""
    not_restored: Names | None = None
    """Trainable tensors that a resumed training does not begin with as they were saved; None for other runs."""
    replica_digests: tuple[str, ...] = ()
    """The same digest from each process, if several trained one model."""
    seconds: float | None = None
    """Wall time of the whole cell, from building to the last answer."""
    variant: str = ""
    """Type of reference that this run is for its cell, such as `rerun` or `resumed`; empty for the cell's own run."""

    @property
    def without_adapter(self) -> bool:
        """Whether the model's own tensors train, all or some of them."""
        return self.adapter_type == ""

    @property
    def adapter_out_of_reach(self) -> bool:
        """Whether an error lost the device, so that the trainable tensors could not be read after the steps."""
        seen = any(s.changed or s.unchanged for s in self.steps)
        return self.error is not None and not self.adapter and seen

    @property
    def taken_steps(self) -> list[StepRecord]:
        """The steps that the loss scaler did not skip; a skipped one may have any gradient, and changes nothing."""
        return [s for s in self.steps if not s.skipped]

    @property
    def losses(self) -> list[float]:
        """Raw loss of every step; NaN if none was seen."""
        return [math.nan if s.loss is None else s.loss for s in self.steps]

    @property
    def grad_norms(self) -> list[float]:
        """Unclipped gradient norm of every step; NaN if none was seen."""
        return [math.nan if s.grad_norm is None else s.grad_norm for s in self.steps]

    def look(self, name: str) -> LookRecord | None:
        """The extra look with this name; None if it was not requested."""
        return next((look for look in self.looks if look.name == name), None)

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain JSON types, which `from_dict` reads back without loss."""
        encoded: dict[str, Any] = encode(self)
        return encoded

    @classmethod
    def from_dict(cls, data: Any) -> RunRecord:
        """Read what `to_dict` returned. Raises RecordError, which names the first value that does not fit."""
        if not isinstance(data, dict) or "schema" not in data:
            raise RecordError("this is not a run record: it is not an object with a schema number")
        if data["schema"] == 1:
            data = from_schema_1(data)
        if data["schema"] != SCHEMA:
            raise RecordError(
                f"the record has schema {data['schema']!r}, this version reads {SCHEMA}: run the cell again"
            )
        record: RunRecord = decode(cls, data, "record")
        return record

    def write(self, path: Path) -> None:
        """Write the record as JSON, completely or not at all. Raises OSError."""
        write_text(path, json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")

    @classmethod
    def read(cls, path: Path) -> RunRecord:
        """Read a file that `write` wrote. Raises RecordError, which names the file and the reason."""
        return read_json(path, cls.from_dict)
