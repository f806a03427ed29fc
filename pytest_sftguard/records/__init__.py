"""Records: everything that was seen of one training, as plain numbers, without torch.

Written by the engine while a cell runs; read by invariants, diagnoses and reports.
"""

from pytest_sftguard.records.answers import (
    AnsweringRecord,
    AnswerRecord,
    BaseAnswersRecord,
    DecodingRecord,
    DifferenceRecord,
    FollowingRecord,
    GenerationRecord,
    ParserRecord,
)
from pytest_sftguard.records.checkpoint import CheckpointRecord
from pytest_sftguard.records.comparisons import (
    ComparisonRecord,
    ContextRecord,
    FinitenessRecord,
    MergeRecord,
    PathRecord,
    PathsRecord,
    RoundTripRecord,
)
from pytest_sftguard.records.encoding import RecordError, numbers, write_text
from pytest_sftguard.records.learning import Learning
from pytest_sftguard.records.micro_batch import (
    AimRecord,
    DerivativeRecord,
    DirectionRecord,
    FootprintRecord,
    FutureRecord,
)
from pytest_sftguard.records.rows import (
    ArrivalRecord,
    BatchesRecord,
    DefectRecord,
    DeviationRecord,
    EvaluationRecord,
    KeptRecord,
    PromptsRecord,
    SupervisionRecord,
)
from pytest_sftguard.records.run import SCHEMA, ErrorRecord, LookRecord, RunRecord
from pytest_sftguard.records.steps import (
    EntropyRecord,
    FirstStepRecord,
    LogRecord,
    ReplayedStepRecord,
    ReplayedTensorRecord,
    ReplayRecord,
    ScheduleRecord,
    StepRecord,
)
from pytest_sftguard.records.tensors import (
    NONE,
    BaseRecord,
    FamilyRecord,
    FoundationRecord,
    InitialRecord,
    Names,
    OptimizerRecord,
    TensorRecord,
    WiringRecord,
)
from pytest_sftguard.records.watching import BaseDuringRecord, RandomnessRecord, ReachRecord
