"""Exceptions of the code under test, as evidence."""

from __future__ import annotations

import traceback

from pytest_sftguard.records import ErrorRecord


def first_line(error: BaseException) -> str:
    """First line of an exception's text; empty if it has none."""
    return (str(error).strip().splitlines() or [""])[0]


def raised(error: BaseException, stage: str) -> ErrorRecord:
    """Record of an exception that ended a run in `stage`: class, first line of its text, and where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}" if frames else ""
    return ErrorRecord(stage=stage, type=type(error).__name__, message=first_line(error)[:500], where=where)
