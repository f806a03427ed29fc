"""One micro-batch of a fresh Trainer: whether its gradient is a derivative, and what its loss depends on."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from pytest_sftguard.engine.adapter.adapters import trainables
from pytest_sftguard.engine.after import forwards
from pytest_sftguard.engine.looks import InapplicableError, Look
from pytest_sftguard.engine.micro_batch.derivative import Derivative
from pytest_sftguard.engine.micro_batch.footprint import aim, footprint
from pytest_sftguard.engine.micro_batch.future import future
from pytest_sftguard.engine.micro_batch.repeated import Repeated, UnaskedError, copied, filled
from pytest_sftguard.engine.recording.watching import wrapped
from pytest_sftguard.engine.stages import Started
from pytest_sftguard.engine.surroundings.errors import first_line
from pytest_sftguard.precision import PrecisionMode, mode_named
from pytest_sftguard.records import AimRecord, DerivativeRecord, FootprintRecord, FutureRecord

_COPIED = 500_000_000
"""Largest number of parameters of a model in half precision that is built in float32, which takes 2 GB."""
_LATE = 2
"""Last steps of which a micro-batch is looked at: a fault at every second step is in one of them."""
RecordT = TypeVar("RecordT", DerivativeRecord, FootprintRecord, AimRecord, FutureRecord)


class _Done(BaseException):
    """Ends the training of the look's own model; no `except Exception` catches it."""


class FirstBatch(Look[Started]):
    """Builds the target again, in float32 where there is room, and stays at its first micro-batch."""

    def attach(self, started: Started) -> None:
        """Keep a micro-batch of each of the last two steps."""
        self._late: dict[int, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {}
        recorder, trainer = started.recorder, started.trainer

        def step(original: Callable[..., Any], model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            number = recorder.taken + 1
            if number > max(1, trainer.state.max_steps - _LATE):
                # compute_loss may take labels out
                self._late[number] = copied(inputs), args, kwargs
            return original(model, inputs, *args, **kwargs)

        trainer.training_step = wrapped(trainer.training_step, step)

    def conclude(self, reached: Started) -> dict[str, Any]:
        """Train up to the first micro-batch, and compute its loss there as often as needed."""
        mode = _mode(reached)
        compiled = {"torch_compile": False} if reached.trainer.args.torch_compile else {}
        trainer: Any = reached.build("first_batch", mode=mode, gradient_accumulation_steps=1, **compiled)
        if mode.name == "fp32" and _ignores_its_type(trainer.model):
            trainer.model.float()
        filled(trainer.model)
        found: list[dict[str, Any]] = []
        original = trainer.training_step

        def once(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            repeated = Repeated(trainer, model)
            loss = repeated.step(original, inputs, *args, **kwargs)
            if not repeated.calls:
                raise InapplicableError("the training step did not call the Trainer's compute_loss")
            found.append(_looked_at(repeated, loss))
            found[0]["later_derivatives"] = tuple(
                _each(DerivativeRecord(at_step=step), functools.partial(self._later, trainer, model, original, step))
                for step in self._moved(reached, model)
            )
            raise _Done

        trainer.training_step = once
        with contextlib.suppress(_Done):
            trainer.train()
        if not found:
            raise InapplicableError("the Trainer did not call its own training_step")
        return found[0]

    def _moved(self, reached: Started, model: Any) -> tuple[int, ...]:
        """Give `model` the trained weights, and return the steps of which a micro-batch is kept."""
        trained, own = reached.recorder.parameters, trainables(model)
        if trained.keys() != own.keys() or any(trained[n].shape != p.shape for n, p in own.items()):
            return ()
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(trained[name])
        return tuple(self._late)

    def _later(self, trainer: Any, model: Any, training_step: Callable[..., Any], step: int) -> DerivativeRecord:
        """Compare along one direction, with the Trainer's count of steps as it was."""
        inputs, args, kwargs = self._late[step]
        # pictures and sounds of a training in half precision
        if not any(p.element_size() < 4 for p in model.parameters()):
            inputs = forwards.in_float32(inputs)
        before, trainer.state.global_step = trainer.state.global_step, step - 1
        try:
            repeated = Repeated(trainer, model)
            loss = repeated.step(training_step, copied(inputs), *args, **kwargs)
            return dataclasses.replace(Derivative(repeated, loss, parts=1).record(), at_step=step)
        finally:
            trainer.state.global_step = before


def _looked_at(repeated: Repeated, loss: float) -> dict[str, Any]:
    # what needs the gradients of the step comes before what computes the loss again
    return {
        "footprint": _each(FootprintRecord(), lambda: footprint(repeated)),
        "aim": _each(AimRecord(), lambda: aim(repeated)),
        "derivative": _each(DerivativeRecord(), Derivative(repeated, loss).record),
        "future": _each(FutureRecord(), lambda: future(repeated)),
    }


def _each(empty: RecordT, look: Callable[[], RecordT]) -> RecordT:
    """Return what `look` sees; where it ends in an exception, that alone, so that it keeps no other from looking."""
    try:
        return look()
    except UnaskedError as reason:
        return dataclasses.replace(empty, left_out=str(reason))
    except Exception as error:
        return dataclasses.replace(empty, error=f"{type(error).__name__}: {first_line(error)[:300]}")


def _mode(reached: Started) -> PrecisionMode:
    """Return float32, or the cell's own mode where a model in half precision is too large, or its kernels are not."""
    model, wide = reached.trainer.model, mode_named("fp32")
    if "flash" in forwards.attention_of(model):
        return reached.mode
    half = any(p.element_size() < 4 for p in model.parameters())
    return reached.mode if half and sum(p.numel() for p in model.parameters()) > _COPIED else wide


def _ignores_its_type(model: Any) -> bool:
    """Whether a model that was asked for in float32 has weights in half precision, and none that are quantised."""
    parameters = list(model.parameters())
    quantised = any(not p.is_floating_point() or p.element_size() == 1 for p in parameters)
    return not quantised and any(p.element_size() < 4 for p in parameters)
