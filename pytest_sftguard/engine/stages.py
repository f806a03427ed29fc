"""The stages of a run, in order: each holds all of the stage before it, and what has been made since."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from torch import Tensor, nn

from pytest_sftguard.engine.adapter.foundation import Loads
from pytest_sftguard.engine.after import forwards
from pytest_sftguard.engine.building import quantised
from pytest_sftguard.engine.building.bases import Bases
from pytest_sftguard.engine.building.targets import Target
from pytest_sftguard.engine.building.trainers import build
from pytest_sftguard.engine.data.examples import Examples
from pytest_sftguard.engine.recording.recorder import Recorder
from pytest_sftguard.engine.recording.watching import Watch
from pytest_sftguard.matrix import RunConfig
from pytest_sftguard.precision import PrecisionMode

if TYPE_CHECKING:
    from transformers import Trainer

StageT = TypeVar("StageT", bound="Asked")

TRAINED = ("training", "resuming")
"""Names of the builds that are trained as the user trains: nothing in them is set otherwise."""

_bases = Bases()
"""The checkpoints of the process: its cells train on the same ones."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A cell was asked for. Nothing of the target exists yet."""

    doing: ClassVar[str] = "build"
    """What the run does at this stage; an `ErrorRecord` of an exception raised here has it as its `stage`."""

    config: RunConfig
    """The cell and its settings."""
    mode: PrecisionMode
    """The cell's precision mode."""
    device_type: str
    """`cpu`, `cuda`, `mps` or `xpu`."""
    target: Target
    """The code under test."""
    folder: Path
    """A temporary folder for this run alone."""

    def then(self, stage: type[StageT], **made: Any) -> StageT:
        """Return the next `stage`: everything of this one, and what was `made` since."""
        return stage(**{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}, **made)

    def build(self, name: str, mode: PrecisionMode | None = None, **training_arguments: Any) -> Trainer:
        """Build a Trainer of the target with other `training_arguments`; its output goes to the subfolder `name`.

        It is of the cell's own precision mode, unless another `mode` is given.
        """
        arguments = {**self.config.training_arguments, **training_arguments}
        config = dataclasses.replace(self.config, training_arguments=arguments)
        with _bases.shared():
            trainer = build(self.target, config, mode or self.mode, self.device_type, self.folder / name)
        if name not in TRAINED:
            quantised.keep_layout(trainer.model)
        return trainer


@dataclass(frozen=True, kw_only=True)
class Built(Asked):
    """The Trainer has been built."""

    doing: ClassVar[str] = "train"

    trainer: Trainer
    """The Trainer that trains."""
    loads: Loads
    """What transformers reported about the checkpoints that its model was loaded from."""


@dataclass(frozen=True, kw_only=True)
class Started(Built):
    """The training has started. A training that raised an exception ends at this stage."""

    recorder: Recorder
    """What is known of each step."""
    watch: Watch
    """Attaches the recorder to the Trainer."""

    @property
    def batches(self) -> list[dict[str, Any]]:
        """The first micro-batches, as the model was given them."""
        return self.watch.batches

    @functools.cached_property
    def given(self) -> dict[str, Any]:
        """What the model was given first, by name, without the arguments of the loss.

        Where the training passes the model by, and calls a part of it, what the model takes of the first micro-batch.
        """
        model, first = self.recorder.model, self.watch.first_step.given
        if first is not None:
            return first
        accepted = forwards.accepts(model)
        seen = self.batches[0] if self.batches else {}
        return forwards.given(model, (), {k: v for k, v in seen.items() if k in accepted})

    @functools.cached_property
    def examples(self) -> Examples | None:
        """The target's questions; None where it asks none, or has no tokenizer to ask them with."""
        return Examples.of(self.target, self.trainer.processing_class)


@dataclass(frozen=True, kw_only=True)
class Trained(Started):
    """The training ended without an exception."""

    doing: ClassVar[str] = "round_trip"

    trained_model: nn.Module
    """The model after the training, unwrapped."""


@dataclass(frozen=True, kw_only=True)
class Rebuilt(Trained):
    """The target has been built a second time, for the saved adapter to be loaded into."""

    fresh_trainer: Trainer
    """The second Trainer."""
    redrawn: set[str] | None
    """Trainable tensors that start with other values under another seed; None where no other seed was tried."""


@dataclass(frozen=True, kw_only=True)
class Reloaded(Rebuilt):
    """The saved adapter has been loaded onto the second model's base."""

    doing: ClassVar[str] = "answers"

    reloaded_model: nn.Module
    """The base with the loaded adapter, in evaluation mode."""
    answered: list[tuple[list[str], Tensor]] = field(default_factory=list)
    """Prompts, and their ids with the answers', (prompts, tokens): greedy generation keeps them here for the looks."""
