"""The base inside `train()`: whether the model that trains is the one that was built and is saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pytest_sftguard.engine.adapter.adapters import base_digests
from pytest_sftguard.engine.looks import InapplicableError, Look
from pytest_sftguard.engine.recording.watching import wrapped
from pytest_sftguard.engine.stages import Started
from pytest_sftguard.records import BaseDuringRecord, Names


class BaseDuring(Look[Started]):
    """Digests the base before the first micro-batch of the training, and before the first one of its last step."""

    def attach(self, started: Started) -> None:
        """Wrap the step of a micro-batch."""
        self._recorder, self._trainer = started.recorder, started.trainer
        self._at: dict[int, dict[str, str]] = {}
        self._trainer.training_step = wrapped(self._trainer.training_step, self._training_step)

    def conclude(self, reached: Started) -> dict[str, Any]:
        """Compare the digests with those before `train()`."""
        if not self._at:
            raise InapplicableError("no micro-batch was trained on")
        before, rewritten = self._recorder.base_before, self._recorder.rewritten
        changed: dict[int, list[str]] = {}
        for step, digests in self._at.items():
            every = sorted(before.keys() | digests.keys())
            changed[step] = [n for n in every if before.get(n) != digests.get(n) and n not in rewritten]
        first = next((step for step, names in changed.items() if names), None)
        return {
            "base_during": BaseDuringRecord(
                tensors=len(before),
                steps=tuple(self._at),
                changed=Names.of(changed[first] if first else ()),
                step=first,
            )
        }

    def _training_step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        step = self._recorder.taken + 1
        if step not in self._at and step in (1, self._trainer.state.max_steps):
            with self.aside():
                self._at[step] = base_digests(self._recorder.model)
        return original(*args, **kwargs)
