"""Looks: checks that take more than watching the training, one file each; run before, during and after it.

A look is a subclass of `Look`. Its file has the name that `tiers.LOOKS` lists. A look costs nothing where no tier or
setting asks for it, and leaves the training bit for bit as it is.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Generic, get_args

from pytest_sftguard import registry
from pytest_sftguard.engine.building.targets import TargetError
from pytest_sftguard.engine.stages import Asked, Built, Rebuilt, StageT, Started
from pytest_sftguard.engine.surroundings.errors import first_line
from pytest_sftguard.engine.surroundings.isolation import isolated
from pytest_sftguard.records import LookRecord

_log = logging.getLogger(__name__)


class InapplicableError(Exception):
    """A run in which there is nothing to look at; the message says why."""


class Look(ABC, Generic[StageT]):
    """Base of the looks: each overrides `conclude`, and the other hooks that it needs.

    `Look[Reloaded]` concludes a run that reached the stage `Reloaded`, and is inapplicable to a run that ended before.
    `Look[Started]` also concludes a training that raised an exception.
    """

    stage: ClassVar[type[Asked]] = Started
    """The stage in the brackets of the base class."""
    last: ClassVar[bool] = False
    """Whether `conclude` changes the models, so that the look must come after all others."""
    ended: Exception | None = None
    """What its work inside the training ended in: nothing is concluded from what it saw."""

    def __init_subclass__(cls) -> None:
        for base in vars(cls).get("__orig_bases__", ()):
            [cls.stage] = get_args(base)

    def prepare(self, built: Built) -> None:
        """Read the model before anything else does: nothing has been trained, and no forward pass has run."""

    def attach(self, started: Started) -> None:
        """Attach hooks to the Trainer: the training begins next."""

    def rebuilt(self, rebuilt: Rebuilt) -> None:
        """Read the second model: nothing has been loaded into it yet."""

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Around work of the look inside the training: an exception ends the look, and never the training."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        except Exception as error:
            self.ended = self.ended or error

    @abstractmethod
    def conclude(self, reached: StageT) -> dict[str, Any]:
        """Return the fields of a RunRecord that this look fills, when the run is over.

        Raises InapplicableError where there is nothing to look at.
        """


class Looks:
    """The looks that a run was asked for. A look that raises is left out from then on, and breaks nothing else."""

    def __init__(self, names: tuple[str, ...]) -> None:
        asked = [(n, registry.load(n, __name__)()) for n in names]
        self._asked: dict[str, Look[Any]] = dict(sorted(asked, key=lambda named: named[1].last))
        self._looks: dict[str, LookRecord] = {}

    def prepare(self, built: Built) -> None:
        """Call `prepare` of each look."""
        for name, look in self._asked.items():
            self._guarded(name, look.prepare, built)

    def attach(self, started: Started) -> None:
        """Call `attach` of each look."""
        for name, look in self._asked.items():
            self._guarded(name, look.attach, started)

    def rebuilt(self, rebuilt: Rebuilt) -> None:
        """Call `rebuilt` of each look."""
        for name, look in self._asked.items():
            self._guarded(name, look.rebuilt, rebuilt)

    def conclude(self, reached: Asked) -> dict[str, Any]:
        """Return the fields that the looks fill after a run that `reached` a stage, `looks` among them."""
        fields: dict[str, Any] = {}
        for name, look in self._asked.items():
            if name not in self._looks and not isinstance(reached, look.stage):
                self._looks[name] = LookRecord(name=name, inapplicable="the run ended before it could be looked at")
            fields.update(self._guarded(name, functools.partial(_concluded, look), reached) or {})
            self._looks.setdefault(name, LookRecord(name=name))
        return fields | {"looks": tuple(self._looks.values())}

    def _guarded(self, name: str, hook: Callable[[StageT], Any], stage: StageT) -> Any:
        """Call `hook`, with random generators that the training does not see, unless the look is out."""
        if name in self._looks:
            return None
        try:
            # what a library says of the guard's own passes is not the user's, whose filters may make errors of it
            with isolated():
                warnings.simplefilter("ignore")
                return hook(stage)
        except InapplicableError as reason:
            self._looks[name] = LookRecord(name=name, inapplicable=str(reason))
        except TargetError:
            raise
        # evidence against the code under test, or a defect of the look: the record must show both
        except Exception as error:
            _log.debug("look %s ended", name, exc_info=True)
            first = first_line(error)[:300]
            self._looks[name] = LookRecord(name=name, error=f"{type(error).__name__}: {first}")
        return None


def _concluded(look: Look[Any], reached: Asked) -> dict[str, Any]:
    """What a look concludes, or the exception that its work inside the training ended in."""
    try:
        return look.conclude(reached)
    finally:
        if look.ended is not None:
            raise look.ended
