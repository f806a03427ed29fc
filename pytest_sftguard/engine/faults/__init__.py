"""The fault library: real failures of LoRA fine-tuning, made to order, one file each.

The file name is the fault's id with underscores, and holds a class of that name. A fault is a context manager around a
target: inside of it the target trains with the failure that people met, and nothing tells the guard of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_sftguard.engine.building.targets import Target, TargetError

if TYPE_CHECKING:
    from transformers import Trainer


class NotApplicableError(TargetError):
    """A fault cannot be made around this target; the message says what it lacks."""


class Fault:
    """Base of the faults: what is known of one, and how it is made.

    Subclasses override `trainer`, for what is wrong with a Trainer once it is built, or `inject` for all else.
    """

    id: ClassVar[str]
    """Its name in the catalogue, such as `nan-loss-logged-as-zero`."""
    source: ClassVar[str]
    """Where people met it."""
    injects: ClassVar[str]
    """What it does to the training, in one sentence."""
    silent: ClassVar[bool] = True
    """Whether every line of the log looks acceptable."""
    reported_by: ClassVar[tuple[str, ...]] = ()
    """Invariants of which at least one must report it; empty for a control, which must stay green."""
    mechanism: ClassVar[str] = ""
    """The diagnosis that must come first; empty for a control."""
    step: ClassVar[int | None] = None
    """Optimizer step at which it strikes; None where it is no matter of a step."""
    tensor: ClassVar[str] = ""
    """A part of the name of the tensor that must be pointed at; empty where it is no matter of a tensor."""
    precision: ClassVar[str] = "fp32"
    """The precision in which it shows."""
    batch: ClassVar[tuple[int, int]] = (4, 1)
    """Micro-batch and accumulation with which it shows."""
    steps: ClassVar[int] = 8
    """Optimizer steps after which it shows."""
    arguments: ClassVar[dict[str, Any]] = {}
    """TrainingArguments with which it shows."""
    looks: ClassVar[tuple[str, ...]] = ()
    """Looks and references that see it, beside those of the tier `standard`."""
    asks: ClassVar[bool] = False
    """Whether it shows in answers alone, so that the target must offer questions."""

    @contextlib.contextmanager
    def inject(self, target: Target) -> Iterator[Target]:
        """`target` with the failure in it; everything is as before at the end."""
        yield wrapped(target, self.trainer)

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """The Trainer of `build`, the target's own function, with something wrong."""
        return build(**arguments)


def wrapped(target: Target, trainer: Callable[..., Trainer]) -> Target:
    """`target` with `trainer(build, **arguments)` in the place of its function."""

    def build(**arguments: Any) -> Trainer:
        return trainer(target.build, **arguments)

    return dataclasses.replace(target, build=build)
