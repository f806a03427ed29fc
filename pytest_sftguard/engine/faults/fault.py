"""Fault: one failure of LoRA fine-tuning, what is known of it, and how it gets into a training."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from transformers import Trainer

from pytest_sftguard.engine.building.targets import Target, TargetError


class NotApplicableError(TargetError):
    """The target lacks what a fault needs; the message says what."""


class Fault:
    """Base class of the faults.

    A subclass overrides `alter` if the failure can be put into a finished Trainer, `trainer` if it has to come in while
    the target builds one, and `inject` for everything else.
    """

    id: ClassVar[str] = ""
    """The name of the class in lower case: `NanBestMetric` is `nan-best-metric`."""
    source: ClassVar[str]
    """URL of a report by somebody who met it."""
    injects: ClassVar[str]
    """What it does to the training: a phrase that begins with a verb."""
    silent: ClassVar[bool] = True
    """Whether every line of the log looks acceptable."""
    reported_by: ClassVar[tuple[str, ...]] = ()
    """Invariants of which at least one must report it; empty for a control, a training that must pass."""
    mechanism: ClassVar[str] = ""
    """Name of the mechanism that the diagnosis must put first; empty for a control."""
    step: ClassVar[int | None] = None
    """First optimizer step that it affects, from 1; None if no step stands out."""
    tensor: ClassVar[str] = ""
    """Part of the name of the tensor that a finding must name; empty if no tensor stands out."""
    precision: ClassVar[str] = "fp32"
    """Precision of the cell that shows it."""
    batch: ClassVar[tuple[int, int]] = (4, 1)
    """Micro-batch and gradient accumulation of that cell."""
    steps: ClassVar[int] = 8
    """Optimizer steps until it shows."""
    arguments: ClassVar[dict[str, Any]] = {}
    """TrainingArguments that it needs."""
    looks: ClassVar[tuple[str, ...]] = ()
    """Looks and references that it needs beyond those of the tier `standard`."""
    asks: ClassVar[bool] = False
    """Whether the target must offer questions, because only the answers show it."""

    def __init_subclass__(cls) -> None:
        cls.id = re.sub(r"(?<!^)(?=[A-Z])", "-", cls.__name__).lower()

    @contextlib.contextmanager
    def inject(self, target: Target) -> Iterator[Target]:
        """Yield `target` with the failure in it; afterwards the process is as it was."""
        yield dataclasses.replace(target, build=functools.partial(self.trainer, target.build))

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """The Trainer that the target's function `build` makes, with the failure in it."""
        trainer = build(**arguments)
        self.alter(trainer)
        return trainer

    def alter(self, trainer: Trainer) -> None:
        """Put the failure into a finished Trainer."""
