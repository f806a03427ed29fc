"""Extra looks at a run, one file each: what can be seen only by more than watching the training.

The file name is the name, as in `tiers.LOOKS`. A look is a subclass of `Look`; it costs nothing where it is not asked
for. It must leave the training as it is: the same numbers come out with and without it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from pytest_sftguard import registry
from pytest_sftguard.engine.adapter.foundation import Loads
from pytest_sftguard.engine.building.targets import Target, TargetError
from pytest_sftguard.engine.surroundings.errors import first_line
from pytest_sftguard.engine.surroundings.isolation import isolated
from pytest_sftguard.matrix import RunConfig
from pytest_sftguard.precision import PrecisionMode
from pytest_sftguard.records import LookRecord

if TYPE_CHECKING:
    from transformers import Trainer

    from pytest_sftguard.engine.looks._examples import Examples
    from pytest_sftguard.engine.recording.recorder import Recorder
    from pytest_sftguard.engine.recording.watching import Watch

_log = logging.getLogger(__name__)


class InapplicableError(Exception):
    """There is nothing to look at in this run; the message says why, in one line."""


@dataclass
class Scene:
    """All that a look may use of the run at hand; what is not there yet is None."""

    config: RunConfig
    """What was asked for."""
    mode: PrecisionMode
    """Its precision mode."""
    device_type: str
    """`cpu`, `cuda`, `mps` or `xpu`."""
    target: Target
    """The code under test."""
    folder: Path
    """A folder of the run's own, gone after it."""
    build: Callable[..., Trainer]
    """Builds another Trainer of the target: `build(name, **training_arguments)`; what it writes goes to `name`."""
    trainer: Trainer | None = None
    """The Trainer that trains, from its building on."""
    recorder: Recorder | None = None
    """Sees the training, from before its first step on."""
    watch: Watch | None = None
    """Attaches the recorder to the Trainer; `watch.batches` holds the first micro-batches as they were trained on."""
    trained: bool = False
    """Whether the training came to its end."""
    trained_model: nn.Module | None = None
    """The model after the training, unwrapped."""
    reloaded: nn.Module | None = None
    """The model that the saved adapter was loaded into, in evaluation mode."""
    fresh_trainer: Trainer | None = None
    """The Trainer that was built for reloading; its model's base is `reloaded`'s."""
    initial: dict[str, Tensor] = field(default_factory=dict)
    """The trainable tensors as they were before the first step, on the device."""
    examples: Examples | None = None
    """The target's questions as they stand in its rows, once a look has asked for them."""
    loads: Loads = field(default_factory=Loads)
    """What transformers said of the checkpoints that the training's model was loaded from."""
    redrawn: set[str] | None = None
    """Trainable tensors that came out otherwise where the target was built under another seed."""


class Look:
    """Base of the looks: each overrides what it needs."""

    needs: str = "trainer"
    """What must be there for `conclude`: `trainer` (also after a training that broke off), `trained` or `reloaded`."""

    def prepare(self, scene: Scene) -> None:
        """The Trainer has been built; nothing has been looked at, and nothing trained."""

    def attach(self, scene: Scene) -> None:
        """The recorder and its watch are there; the training begins next."""

    def rebuilt(self, scene: Scene) -> None:
        """The target has been built once more, as `scene.fresh_trainer`, and nothing was loaded into it yet."""

    def conclude(self, scene: Scene) -> dict[str, Any]:
        """The run is over: the fields of a RunRecord that this look fills.

        Raises InapplicableError where there is nothing to look at.
        """
        return {}


class Looks:
    """The looks that a run was asked for. One that raises is out, and breaks neither the run nor the others."""

    def __init__(self, names: tuple[str, ...]) -> None:
        last = sorted(names, key=lambda name: name == "merging")  # after it there is no adapter left to look at
        self._asked: dict[str, Look] = {n: registry.load(n, __name__)() for n in last}
        self._looks: dict[str, LookRecord] = {}

    def prepare(self, scene: Scene) -> None:
        """Let each look at the Trainer, with random generators that the training does not see."""
        for name, look in self._asked.items():
            self._guarded(name, look.prepare, scene)

    def attach(self, scene: Scene) -> None:
        """Let each attach itself."""
        for name, look in self._asked.items():
            self._guarded(name, look.attach, scene)

    def rebuilt(self, scene: Scene) -> None:
        """Let each look at the second model."""
        for name, look in self._asked.items():
            self._guarded(name, look.rebuilt, scene)

    def conclude(self, scene: Scene) -> dict[str, Any]:
        """The fields that all of them fill, `looks` among them."""
        there = {"trainer": scene.trainer is not None, "trained": scene.trained, "reloaded": scene.reloaded is not None}
        fields: dict[str, Any] = {}
        for name, look in self._asked.items():
            if name not in self._looks and not there[look.needs]:
                self._looks[name] = LookRecord(name=name, inapplicable="the run ended before it could be looked at")
            fields.update(self._guarded(name, look.conclude, scene) or {})
            self._looks.setdefault(name, LookRecord(name=name))
        return fields | {"looks": tuple(self._looks.values())}

    def _guarded(self, name: str, step: Callable[[Scene], Any], scene: Scene) -> Any:
        if name in self._looks:
            return None
        try:
            with isolated():
                return step(scene)
        except InapplicableError as reason:
            self._looks[name] = LookRecord(name=name, inapplicable=str(reason))
        except TargetError:
            raise
        except Exception as error:  # evidence against the code under test, or a defect of the look: both must be seen
            _log.debug("look %s ended", name, exc_info=True)
            first = first_line(error)[:300]
            self._looks[name] = LookRecord(name=name, error=f"{type(error).__name__}: {first}")
        return None
