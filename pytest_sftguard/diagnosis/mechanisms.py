"""The table of mechanisms: every cause that is told apart."""

from __future__ import annotations

from pytest_sftguard.diagnosis.mechanism import Mechanism
from pytest_sftguard.diagnosis.numbers import NUMBERS
from pytest_sftguard.diagnosis.wiring import WIRING

MECHANISMS: tuple[Mechanism, ...] = (*NUMBERS, *WIRING)
"""Every mechanism; where two are worth the same, the earlier one goes first."""
