"""Records: everything that was seen of one training, as plain numbers. A record knows nothing of torch."""

from pytest_sftguard.records.encoding import RecordError, numbers, write_text
from pytest_sftguard.records.first_step import FirstStepRecord
from pytest_sftguard.records.looks import LookRecord
from pytest_sftguard.records.names import Names
from pytest_sftguard.records.results import AnswerRecord, RoundTripRecord
from pytest_sftguard.records.run import SCHEMA, ErrorRecord, RunRecord
from pytest_sftguard.records.training import BaseRecord, LogRecord, OptimizerRecord, StepRecord, TensorRecord

__all__ = [
    "SCHEMA",
    "AnswerRecord",
    "BaseRecord",
    "ErrorRecord",
    "FirstStepRecord",
    "LogRecord",
    "LookRecord",
    "Names",
    "OptimizerRecord",
    "RecordError",
    "RoundTripRecord",
    "RunRecord",
    "StepRecord",
    "TensorRecord",
    "numbers",
    "write_text",
]
