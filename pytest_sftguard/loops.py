"""Judging a loop of the user's own, of which an Observer makes the record."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from pytest_sftguard import registry
from pytest_sftguard.invariants import usable_invariants, with_thresholds
from pytest_sftguard.reports import json_files
from pytest_sftguard.session import CannotRunError, writing
from pytest_sftguard.verdicts import JudgedRun, judge

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_sftguard.engine.recording.observer import Observer
    from pytest_sftguard.records import RunRecord
    from pytest_sftguard.settings import Settings

_OF_THE_VERDICT = ("invariants", "thresholds", "waive")


def judged(
    record: RunRecord,
    *,
    invariants: Iterable[str] = (),
    thresholds: Mapping[str, Any] | None = None,
    waive: Iterable[str] = (),
) -> JudgedRun:
    """`record` and the verdict on it.

    `invariants` are dotted paths of your own, `thresholds` go by `invariant.field`, and `waive` names invariants that
    you know not to hold. Raises registry.NotFoundError for a threshold that there is not.
    """
    every = with_thresholds(usable_invariants(invariants), thresholds or {})
    return JudgedRun(record, judge(record, every, {}, waive))


class LoopTest:
    """A test that trains by itself; called, it makes the test's one Observer.

    `resolve` gives the session's settings with some keywords of a marker in their place.
    """

    def __init__(self, nodeid: str, resolve: Callable[[Mapping[str, Any]], Settings]) -> None:
        self.nodeid, self._resolve = nodeid, resolve
        self._settings: Settings | None = None
        self._observer: Observer | None = None

    def __call__(self, model: Any, optimizer: Any = None, *, accelerator: Any = None, **more: Any) -> Observer:
        """An Observer of `model`; of a plain accelerate loop where `accelerator` is given.

        `waive`, `thresholds` and `invariants` are as in the marker, the rest goes to Observer.
        """
        from pytest_sftguard.engine.recording.observer import Observer, observe_accelerate

        if self._observer is not None:
            raise RuntimeError("one test observes one training: write a second test, or parametrize this one")
        self._settings = self._resolve({k: more.pop(k) for k in _OF_THE_VERDICT if k in more})
        more = {"name": self.nodeid, **more}
        if accelerator is None:
            self._observer = Observer(model, optimizer, **more)
        else:
            self._observer = observe_accelerate(accelerator, model, optimizer, **more)
        return self._observer

    @property
    def strict(self) -> bool:
        """Whether the test fails where the training is not evaluated."""
        return self._settings is not None and bool(self._settings.strict or self._settings.require_gpu)

    def run(self, root: Path) -> JudgedRun | None:
        """The observed training, judged, and its record written below `root`; None where nothing was observed.

        Raises CannotRunError for a threshold or a folder that cannot be used.
        """
        if self._observer is None or self._settings is None:
            return None
        record, settings = self._observer.record(), self._settings
        folder = root / settings.dir
        with writing(folder):
            json_files.write(folder, self.nodeid, record)
        try:
            return judged(record, invariants=settings.invariants, thresholds=settings.thresholds, waive=settings.waive)
        except registry.NotFoundError as error:
            raise CannotRunError(str(error)) from None

    def close(self) -> None:
        """Take all hooks off."""
        if self._observer is not None:
            self._observer.detach()
