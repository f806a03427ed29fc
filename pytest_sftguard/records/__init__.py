"""Records: everything that was seen of one training, as plain numbers. A record knows nothing of torch."""

from pytest_sftguard.records.afterwards import BaseAnswersRecord, MergeRecord, ParserRecord
from pytest_sftguard.records.encoding import RecordError, numbers, write_text
from pytest_sftguard.records.learning import Learning
from pytest_sftguard.records.looks import LookRecord
from pytest_sftguard.records.names import Names
from pytest_sftguard.records.results import AnswerRecord, RoundTripRecord
from pytest_sftguard.records.run import SCHEMA, ErrorRecord, RunRecord
from pytest_sftguard.records.training import BaseRecord, LogRecord, OptimizerRecord, StepRecord, TensorRecord

__all__ = [
    "SCHEMA",
    "AnswerRecord",
    "BaseAnswersRecord",
    "BaseRecord",
    "ErrorRecord",
    "Learning",
    "LogRecord",
    "LookRecord",
    "MergeRecord",
    "Names",
    "OptimizerRecord",
    "ParserRecord",
    "RecordError",
    "RoundTripRecord",
    "RunRecord",
    "StepRecord",
    "TensorRecord",
    "numbers",
    "write_text",
]
