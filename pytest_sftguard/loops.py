"""Judging a training loop of the user's own by the record that an Observer makes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from pytest_sftguard import session
from pytest_sftguard.invariants import usable_invariants, with_thresholds
from pytest_sftguard.settings import SETTINGS
from pytest_sftguard.verdicts import Checks, JudgedRun, judge

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_sftguard.engine.recording.observer import Observer
    from pytest_sftguard.records import RunRecord
    from pytest_sftguard.settings import Settings


def judged(
    record: RunRecord,
    *,
    invariants: Iterable[str] = (),
    thresholds: Mapping[str, Any] | None = None,
    waive: Iterable[str] = (),
) -> JudgedRun:
    """`record` and the verdict on it.

    `invariants` are dotted paths of your own, `thresholds` go by `invariant.field`, and `waive` names invariants whose
    violation you accept. Raises registry.NotFoundError for a threshold that does not exist.
    """
    every = with_thresholds(usable_invariants(invariants), thresholds or {})
    return JudgedRun(record, judge(record, every, {}, waive))


class LoopTest:
    """A test that trains by itself; called, it makes the test's one Observer.

    `resolve` gives the session's settings, overridden by the keywords that it is handed.
    """

    def __init__(self, nodeid: str, resolve: Callable[[Mapping[str, Any]], Settings]) -> None:
        self.nodeid, self._resolve = nodeid, resolve
        self._settings: Settings | None = None
        self._invariants: list[Checks] = []
        self._observer: Observer | None = None

    def __call__(self, model: Any, optimizer: Any = None, *, accelerator: Any = None, **more: Any) -> Observer:
        """An Observer of `model`; of a plain accelerate loop where `accelerator` is given.

        `waive`, `thresholds` and `invariants` are as in the marker, the rest goes to Observer. Raises CannotRunError
        for a threshold that does not exist.
        """
        from pytest_sftguard.engine.recording.observer import Observer, observe_accelerate

        if self._observer is not None:
            raise RuntimeError("one test observes one training: write a second test, or parametrize this one")
        self._settings = self._resolve({s.name: more.pop(s.name) for s in SETTINGS if s.loop and s.name in more})
        self._invariants = session.invariants_of(self._settings)
        more = {"name": self.nodeid, **more}
        if accelerator is None:
            self._observer = Observer(model, optimizer, **more)
        else:
            self._observer = observe_accelerate(accelerator, model, optimizer, **more)
        return self._observer

    @property
    def fails_unevaluated(self) -> bool:
        """Whether the test fails, and is not skipped, where the training is not evaluated."""
        return self._settings is not None and self._settings.fails_unevaluated

    def run(self, root: Path) -> JudgedRun:
        """The observed training, judged; the reports write below `root`.

        Raises CannotRunError where nothing was observed, and for a folder that cannot be used.
        """
        if self._observer is None or self._settings is None:
            raise session.CannotRunError("sft_observer was not called: nothing was observed")
        record, settings = self._observer.record(), self._settings
        run = JudgedRun(record, judge(record, self._invariants, {}, settings.waive, strict=settings.fails_unevaluated))
        session.report("write", root / settings.dir, self.nodeid, run)
        return run

    def close(self) -> None:
        """Take all hooks off."""
        if self._observer is not None:
            self._observer.detach()
