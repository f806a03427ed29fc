"""Diagnosis: the mechanism behind a failed verdict where there is evidence for it, or else what is certain."""

from pytest_sftguard.diagnosis.case import Case, Clue, against, decisive, hint, sign
from pytest_sftguard.diagnosis.mechanism import Mechanism
from pytest_sftguard.diagnosis.mechanisms import MECHANISMS
from pytest_sftguard.diagnosis.naming import Diagnosis, diagnose
from pytest_sftguard.diagnosis.stations import NEVER_MEANT, Certain, Station, certain

__all__ = [
    "MECHANISMS",
    "NEVER_MEANT",
    "Case",
    "Certain",
    "Clue",
    "Diagnosis",
    "Mechanism",
    "Station",
    "against",
    "certain",
    "decisive",
    "diagnose",
    "hint",
    "sign",
]
