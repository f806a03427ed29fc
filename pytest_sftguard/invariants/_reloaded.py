"""What the invariants share that compare the reloaded model with the trained one."""

from __future__ import annotations

from pytest_sftguard.records import RunRecord
from pytest_sftguard.verdicts import Finding, General, Invariant


def not_reloaded(invariant: Invariant, record: RunRecord) -> Finding | None:
    """The finding where an exception of the guard's own ended the comparison; None where none did."""
    error = record.round_trip.not_asked if record.round_trip else ""
    if not error:
        return None
    return invariant.not_evaluated(General.LOOK_BROKE, name="round_trip", error=error, required=False)
