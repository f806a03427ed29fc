"""The micro-batches of a target that fit into a device's memory."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pytest_sftguard.engine.memory.prediction import PredictionError, Rehearsal, free_bytes, rehearsal
from pytest_sftguard.hardware import HardwareProfile
from pytest_sftguard.matrix import Cell, RunConfig
from pytest_sftguard.precision import PrecisionMode
from pytest_sftguard.sizes import fits, format_bytes, largest


@dataclass(frozen=True, kw_only=True)
class Question:
    """A target, a device, and the micro-batches to predict."""

    target: str
    """Dotted path of the function that builds the Trainer."""
    model: str | None
    """Model that it loads; None for its own default."""
    profile: HardwareProfile
    """The device."""
    free: int
    """Bytes that the training can use there."""
    margin: float
    """Share of them to leave unused."""
    batches: tuple[int, ...]
    """Micro-batches to show."""
    accumulation: int
    """Micro-batches per optimizer step."""
    longest: bool
    """Whether each micro-batch consists of the longest rows; otherwise it is the first that the Trainer draws."""
    limit: int
    """Largest micro-batch to try."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The micro-batches that fit in one precision; `str` formats them as lines of a report."""

    precision: str
    """Name of the precision mode."""
    peaks: dict[int, int]
    """Predicted peak in bytes for each requested micro-batch."""
    question: Question
    """The question."""
    largest: int = 0
    """Largest micro-batch that fits; 0 if none does."""
    tokens: int = 0
    """Length of the rows, in tokens."""
    unknown: str | None = None
    """Why there is no answer."""

    def __str__(self) -> str:
        if self.unknown is not None:
            return f"{self.precision:<11} {self.unknown}"
        parts = [f"{b}: {format_bytes(n)}{'' if self._fits(n) else ' no'}" for b, n in self.peaks.items()]
        if self.largest == 0:
            last = "not even one row fits"
        elif self.largest >= self.question.limit:
            last = f"--micro-batch {self.largest} fits; more was not tried"
        else:
            last = f"largest: --micro-batch {self.largest}"
        return f"{self.precision:<11} {last} (rows of {self.tokens} tokens)\n{'':<11} {', '.join(parts)}"

    def _fits(self, need: int) -> bool:
        return fits(need, self.question.free, self.question.margin)


def free(profile: HardwareProfile, *, here: bool) -> int | None:
    """Bytes that a training can use on the device: measured if it is `here`, and otherwise those of the profile."""
    if here:
        return free_bytes("cuda" if profile.device_type == "rocm" else profile.device_type)
    stated = profile.free_memory_bytes
    return profile.total_memory_bytes if stated is None else stated


def ask(question: Question, mode: PrecisionMode) -> Answer:
    """Rehearse the training in `mode`. Raises TargetError if the target breaks its contract."""
    unknown = question.profile.lacks(mode)
    if unknown is not None:
        return Answer(precision=mode.name, peaks={}, question=question, unknown=unknown)
    cell = Cell(mode.name, 1, question.accumulation)
    config = RunConfig(cell=cell, target=question.target, model=question.model, device="cpu")
    try:
        with _quiet(), rehearsal(config, question.profile) as ready:
            return _rehearsed(question, mode, ready)
    except PredictionError as error:
        return Answer(precision=mode.name, peaks={}, question=question, unknown=f"cannot be predicted: {error}")


def _rehearsed(question: Question, mode: PrecisionMode, ready: Rehearsal) -> Answer:
    known: dict[int, int] = {}
    tokens = 0

    def peak(rows: int) -> int:
        nonlocal tokens
        if rows not in known:
            prediction = ready.predict(rows, question.accumulation, longest=question.longest)
            known[rows] = prediction.peak_bytes
            tokens = prediction.tokens[-1] if prediction.tokens else 0
        return known[rows]

    best = largest(peak, question.free * (1 - question.margin), question.limit)
    peaks = {b: peak(b) for b in question.batches}
    return Answer(precision=mode.name, question=question, peaks=peaks, largest=best, tokens=tokens)


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the libraries' progress bars and warnings, because the output is a table."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
