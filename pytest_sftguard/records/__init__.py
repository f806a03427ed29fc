"""Records: everything that was seen of one training, as plain numbers. A record knows nothing of torch."""

from pytest_sftguard.records.context import ComparisonRecord, ContextRecord
from pytest_sftguard.records.decoding import DecodingRecord, DifferenceRecord, GenerationRecord
from pytest_sftguard.records.encoding import RecordError, numbers, write_text
from pytest_sftguard.records.evaluation import EvaluationRecord
from pytest_sftguard.records.looks import LookRecord
from pytest_sftguard.records.names import Names
from pytest_sftguard.records.paths import PathRecord, PathsRecord
from pytest_sftguard.records.results import AnswerRecord, RoundTripRecord
from pytest_sftguard.records.run import SCHEMA, ErrorRecord, RunRecord
from pytest_sftguard.records.training import BaseRecord, LogRecord, OptimizerRecord, StepRecord, TensorRecord

__all__ = [
    "SCHEMA",
    "AnswerRecord",
    "BaseRecord",
    "ComparisonRecord",
    "ContextRecord",
    "DecodingRecord",
    "DifferenceRecord",
    "ErrorRecord",
    "EvaluationRecord",
    "GenerationRecord",
    "LogRecord",
    "LookRecord",
    "Names",
    "OptimizerRecord",
    "PathRecord",
    "PathsRecord",
    "RecordError",
    "RoundTripRecord",
    "RunRecord",
    "StepRecord",
    "TensorRecord",
    "numbers",
    "write_text",
]
