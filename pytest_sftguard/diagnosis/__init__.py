"""Diagnosis: the mechanism that most probably lies behind a failed verdict, with evidence, doubts and the cure."""

from pytest_sftguard.diagnosis.case import Case, Clue, against, decisive, hint, sign
from pytest_sftguard.diagnosis.mechanism import Mechanism
from pytest_sftguard.diagnosis.mechanisms import MECHANISMS
from pytest_sftguard.diagnosis.naming import Diagnosis, diagnose

__all__ = [
    "MECHANISMS",
    "Case",
    "Clue",
    "Diagnosis",
    "Mechanism",
    "against",
    "decisive",
    "diagnose",
    "hint",
    "sign",
]
