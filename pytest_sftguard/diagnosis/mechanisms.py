"""The table of mechanisms: every cause that is told apart."""

from __future__ import annotations

from pytest_sftguard.diagnosis.across import ACROSS
from pytest_sftguard.diagnosis.course import COURSE
from pytest_sftguard.diagnosis.data import DATA
from pytest_sftguard.diagnosis.inference import INFERENCE
from pytest_sftguard.diagnosis.mechanism import Mechanism
from pytest_sftguard.diagnosis.numbers import NUMBERS
from pytest_sftguard.diagnosis.saving import SAVING
from pytest_sftguard.diagnosis.wiring import WIRING

MECHANISMS: tuple[Mechanism, ...] = (*WIRING, *DATA, *NUMBERS, *COURSE, *SAVING, *INFERENCE, *ACROSS)
"""Every mechanism; of two that are worth the same, the earlier goes first: causes before what follows from them."""
