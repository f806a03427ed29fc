"""Records: everything that was seen of one training, as plain numbers. A record knows nothing of torch."""

from pytest_sftguard.records.afterwards import BaseAnswersRecord, MergeRecord, ParserRecord
from pytest_sftguard.records.audit import DefectRecord, PromptsRecord, SupervisionRecord
from pytest_sftguard.records.context import ComparisonRecord, ContextRecord
from pytest_sftguard.records.decoding import DecodingRecord, DifferenceRecord, GenerationRecord
from pytest_sftguard.records.encoding import RecordError, numbers, write_text
from pytest_sftguard.records.evaluation import EvaluationRecord
from pytest_sftguard.records.first_step import FirstStepRecord
from pytest_sftguard.records.learning import Learning
from pytest_sftguard.records.looks import LookRecord
from pytest_sftguard.records.names import NONE, Names
from pytest_sftguard.records.paths import PathRecord, PathsRecord
from pytest_sftguard.records.replay import ReplayedStepRecord, ReplayedTensorRecord, ReplayRecord
from pytest_sftguard.records.results import AnswerRecord, FinitenessRecord, RoundTripRecord
from pytest_sftguard.records.run import SCHEMA, ErrorRecord, RunRecord
from pytest_sftguard.records.schedule import ScheduleRecord
from pytest_sftguard.records.training import BaseRecord, LogRecord, OptimizerRecord, StepRecord, TensorRecord
from pytest_sftguard.records.wiring import FoundationRecord, InitialRecord, WiringRecord

__all__ = [
    "NONE",
    "SCHEMA",
    "AnswerRecord",
    "BaseAnswersRecord",
    "BaseRecord",
    "ComparisonRecord",
    "ContextRecord",
    "DecodingRecord",
    "DefectRecord",
    "DifferenceRecord",
    "ErrorRecord",
    "EvaluationRecord",
    "FinitenessRecord",
    "FirstStepRecord",
    "FoundationRecord",
    "GenerationRecord",
    "InitialRecord",
    "Learning",
    "LogRecord",
    "LookRecord",
    "MergeRecord",
    "Names",
    "OptimizerRecord",
    "ParserRecord",
    "PathRecord",
    "PathsRecord",
    "PromptsRecord",
    "RecordError",
    "ReplayRecord",
    "ReplayedStepRecord",
    "ReplayedTensorRecord",
    "RoundTripRecord",
    "RunRecord",
    "ScheduleRecord",
    "StepRecord",
    "SupervisionRecord",
    "TensorRecord",
    "WiringRecord",
    "numbers",
    "write_text",
]
