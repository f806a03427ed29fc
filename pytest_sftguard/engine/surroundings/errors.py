"""Exceptions as evidence: those of the code under test, and those of the guard's own, which say nothing about it."""

from __future__ import annotations

import contextlib
import traceback
from types import TracebackType

import torch

from pytest_sftguard.records import ErrorRecord


class GuardError(Exception):
    """Code of the guard's own raised its `__cause__`, beside the training."""


class _OwnWork(contextlib.ContextDecorator):
    def __enter__(self) -> None:
        """Nothing needs to be set up."""

    def __exit__(
        self, type_: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception) and not isinstance(error, (GuardError, torch.OutOfMemoryError)):
            raise GuardError(str(error)) from error


own_work = _OwnWork()
"""Around code of the guard's own that calls nothing of the training's: what it raises becomes a GuardError.

Except for a lack of memory, which the training may have caused, and mends by itself where it looks for a batch size
that fits.
"""


def first_line(error: BaseException) -> str:
    """First line of an exception's text; empty if it has none."""
    return (str(error).strip().splitlines() or [""])[0]


def raised(error: BaseException, stage: str, *, lost: bool = False) -> ErrorRecord:
    """Record of an exception that ended a run in `stage`: class, first line of its text, and where it was raised.

    Of a GuardError it is the cause, marked as the guard's own unless the device was `lost`: then whoever touches it
    raises, and that may be the guard.
    """
    own = isinstance(error, GuardError)
    source = error.__cause__ if own and error.__cause__ is not None else error
    frames = traceback.extract_tb(source.__traceback__)
    where = f"{frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}" if frames else ""
    return ErrorRecord(
        stage=stage,
        type=type(source).__name__,
        message=first_line(source)[:500],
        where=where,
        guards_own=own and not lost,
    )
