"""Observing a loop of the user's own: a plain torch loop by explicit calls, or one of accelerate.

A Trainer is watched from inside (see watching.py). Any other loop tells an `Observer` the loss of each micro-batch,
that all gradients of a step are complete, that the step is over, and that the training is over.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from pytest_sftguard.engine.adapter import adapters, redrawing
from pytest_sftguard.engine.adapter.round_trip import round_trip
from pytest_sftguard.engine.after import finiteness, forwards
from pytest_sftguard.engine.machine.profiles import device_profile, versions
from pytest_sftguard.engine.recording import scales
from pytest_sftguard.engine.recording.layers import LayerWatch
from pytest_sftguard.engine.recording.recorder import Recorder
from pytest_sftguard.engine.recording.schedules import Schedule
from pytest_sftguard.engine.surroundings import devices, float32
from pytest_sftguard.engine.surroundings.errors import GuardError, raised
from pytest_sftguard.engine.surroundings.isolation import isolated
from pytest_sftguard.matrix import Cell
from pytest_sftguard.precision import MODES, mode_named
from pytest_sftguard.records import ErrorRecord, Names, RoundTripRecord, RunRecord


class Observer:
    """Observes one training of `model`; best used as a context manager around the loop.

    `model` is complete: the adapter is attached, and trainable parameters have `requires_grad=True`. `optimizer`,
    `scaler` (a torch GradScaler) and `scheduler` are those of the loop. Optimizer and scaler can also be passed to
    `before_step`.

    `precision` is the expected mode of the matrix, such as `bf16-mixed`; without it, the observed mode is expected.
    `steps` is the number of optimizer steps that the loop must take; without it, any number from one on is right.
    `max_grad_norm` is the clipping threshold, compared with the gradients that the optimizer received; 0 means no
    clipping. `fresh` builds the model again, untrained: with it the adapter is saved at the end, by
    `model.save_pretrained` or by `save` (which receives a folder), and loaded onto a fresh base.

    An exception of the guard's own ends the observation, and never the loop: `record` has it as its `error`.

    Raises ValueError for an unknown precision.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any = None,
        *,
        scaler: Any = None,
        scheduler: Any = None,
        precision: str | None = None,
        steps: int | None = None,
        gradient_accumulation_steps: int | None = None,
        max_grad_norm: float | None = None,
        fresh: Callable[[], nn.Module] | None = None,
        save: Callable[[str], Any] | None = None,
        name: str = "a loop of the user's own",
    ) -> None:
        if precision is not None:
            mode_named(precision)
        self.recorder = Recorder(extract_model_from_parallel(model))
        self.optimizer: torch.optim.Optimizer | None = None
        self.scaler = scaler
        self._schedule = None if scheduler is None else Schedule(scheduler)
        self._precision, self._asked_steps, self._accumulation = precision, steps, gradient_accumulation_steps
        self._max_grad_norm = max_grad_norm
        self._fresh, self._save, self._name = fresh, save, name
        self._started = time.perf_counter()
        self._seconds: float | None = None
        self._seed = torch.initial_seed() % 2**32
        self._losses: list[Tensor] = []
        self._rate: float | None = None
        self._inputs: dict[str, Tensor] = {}
        self._labels: Tensor | None = None
        self._first_inputs: dict[str, Tensor] = {}
        self._error: ErrorRecord | None = None
        self._seen: RunRecord | None = None
        self._loss_scaling = False
        self._undo: list[Callable[[], Any]] = []
        self._beside = _Beside(self._give_up)
        self._layers = LayerWatch(self.recorder, self._beside)
        inner = self.recorder.model
        forward = inner.register_forward_pre_hook(self._forward, with_kwargs=True)
        backward = inner.register_forward_hook(self._forward_done, always_call=True)
        self._undo += [self._layers.detach, forward.remove, backward.remove]
        self._adopt(optimizer)

    def __enter__(self) -> Observer:
        return self

    def __exit__(
        self, type_: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception):
            self._error = raised(error, "train")
        self.detach()

    def _give_up(self, error: GuardError) -> None:
        lost = not devices.answers(next(self.recorder.model.parameters()).device.type)
        self._error = raised(error, "train", lost=lost)
        self.detach()

    def micro_batch(self, loss: Tensor, *, inputs: Any = None, labels: Tensor | None = None) -> None:
        """Record the loss of a micro-batch before its backward pass, as the model returned it: not divided or scaled.

        `inputs` and `labels` are not necessary if the model itself was called with them.
        """
        if self._error is not None:
            return
        given = inputs if isinstance(inputs, Mapping) else self._inputs
        if labels is None:
            labels = given.get("labels", self._labels)
        if not self._first_inputs:
            self._first_inputs = {k: v for k, v in given.items() if isinstance(v, Tensor)}
        with self._beside:
            self.recorder.start_clock()
            if not self._losses and loss.requires_grad:
                # torch leaves it untyped
                loss.register_hook(self._backward_begins)  # type: ignore[no-untyped-call]
            self._losses.append(loss.detach())
            self.recorder.collated({"labels": labels})
            self.recorder.micro_batch(loss)
        self._inputs, self._labels = {}, None

    def before_step(self, optimizer: Any = None, scaler: Any = None) -> None:
        """Record the gradients of the step. Call it after the last backward pass, and before clipping.

        It may come before or after `scaler.unscale_`.
        """
        if self._error is not None:
            return
        self._adopt(optimizer)
        self.scaler = self.scaler if scaler is None else scaler
        with self._beside:
            self.recorder.before_step(scales.current(self.scaler), scaled=scales.still_on(self.scaler, self.optimizer))
            self._rate = _rate(self.optimizer)

    def after_step(self, optimizer: Any = None) -> None:
        """Record the step. Call it after `optimizer.step()`, or after `scaler.update()` if there is a scaler.

        Call it also for a step that the scaler skipped. Raises TypeError if the Observer has no optimizer.
        """
        if self._error is not None:
            return
        self._adopt(optimizer)
        if self.optimizer is None:
            raise TypeError("the Observer knows no optimizer: give it one, Observer(model, optimizer)")
        scale = scales.current(self.scaler)
        self._loss_scaling = self._loss_scaling or scale is not None
        with self._beside:
            for loss in self._losses:
                self.recorder.micro_batch_done(loss.float().mean() / len(self._losses))
            self.recorder.after_step(self.optimizer, self._rate, scale)
        self._losses = []
        self._seen = None

    def detach(self) -> None:
        """End the observation and remove all hooks, as the context manager does at its end."""
        if self._seconds is None:
            self._seconds = time.perf_counter() - self._started
        for undo in self._undo:
            undo()
        self._undo = []

    def on_detach(self, undo: Callable[[], Any]) -> None:
        """Call `undo` when the observation ends."""
        self._undo.append(undo)

    def record(self) -> RunRecord:
        """The record of the training; with `fresh`, it includes the round trip of the adapter."""
        self.detach()
        if self._seen is None:
            self._seen = self._recorded()
        return self._seen

    def _recorded(self) -> RunRecord:
        recorder = self.recorder
        device_type = next(iter(recorder.model.parameters())).device.type
        try:
            seen = recorder.fields(self.optimizer, whole=devices.answers(device_type))
        except GuardError as error:
            self._give_up(error)
            seen = {"steps": tuple(recorder.steps)}
        trip = self._round_trip()
        steps = seen["steps"]
        rows = next((v.shape[0] for v in self._first_inputs.values() if v.dim()), 1)
        accumulation = self._accumulation or max((len(s.micro_losses) for s in steps), default=1) or 1
        tf32 = float32.products_in_tf32() if device_type == "cuda" else None
        weights = adapters.weights_dtypes(recorder.model)
        precision = self._precision or self._seen_precision(weights, tf32)
        return RunRecord(
            cell=str(Cell(precision, rows, accumulation)),
            precision=precision,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=accumulation,
            max_steps=self._asked_steps or max(1, len(steps)),
            seed=self._seed,
            target=self._name,
            device=device_profile(device_type),
            versions=versions(),
            observed=True,
            error=self._error,
            compute_dtypes=self._layers.compute_dtypes,
            adapter_type=adapters.adapter_type(recorder.model),
            weights_dtypes=weights,
            autocast_dtype=self._layers.autocast_dtype,
            loss_scaling=self._loss_scaling,
            tf32=tf32,
            max_grad_norm=self._max_grad_norm,
            global_step=len(steps),
            schedule=None if self._schedule is None else self._schedule.record(self._asked_steps or len(steps)),
            round_trip=trip,
            seconds=self._seconds,
            **seen,
        )

    def _seen_precision(self, weights: Mapping[str, int], tf32: bool | None) -> str:
        """The mode that matches the training best."""
        seen = (
            next(iter(self._layers.compute_dtypes), "float32"),
            self._layers.autocast_dtype is not None,
            Counter(weights).most_common(1)[0][0] if weights else "float32",
            self._loss_scaling,
            bool(tf32),
        )

        def matches(mode: Any) -> tuple[bool, ...]:
            promised = (mode.compute_dtype, mode.autocast, mode.storage_dtype, mode.scaler, mode.name == "tf32")
            return tuple(p == s for p, s in zip(promised, seen, strict=True))

        return max(MODES.values(), key=matches).name

    def _round_trip(self) -> RoundTripRecord | None:
        """Save the adapter, and load it onto the base of a fresh model."""
        recorder, trained = self.recorder, self.recorder.model
        if self._fresh is None or self._error is not None or not recorder.taken:
            return None
        training = trained.training
        try:
            with isolated(), tempfile.TemporaryDirectory(prefix="sftguard-") as folder:
                saved = Path(folder) / "adapter"
                # a PeftModel's own method
                (self._save or trained.save_pretrained)(str(saved))  # type: ignore[operator]
                fresh = self._fresh()
                compared = redrawing.redrawn(recorder.base_before, trained, fresh)
                asked = finiteness.probe_of(forwards.given(trained, (), self._first_inputs), trained)
                found, _ = round_trip(trained, saved, fresh, asked, recorder.unused)
                digest, drawn = compared.without(trained, saved)
        # whatever saving, building and loading raise is evidence
        except Exception as error:
            self._error = raised(error, "round_trip")
            return None
        finally:
            trained.train(training)
        return dataclasses.replace(found, fresh_base_digest=digest, drawn=Names.of(drawn))

    def _adopt(self, optimizer: Any) -> None:
        """Observe `optimizer` from now on, without the wrapper of accelerate."""
        while (inner := getattr(optimizer, "optimizer", None)) is not None:
            optimizer = inner
        if optimizer is not None and optimizer is not self.optimizer:
            self.optimizer = optimizer
            self._undo.append(optimizer.register_step_pre_hook(self._optimizer_begins).remove)

    def _optimizer_begins(self, optimizer: Any, *_: Any) -> None:
        scaled = scales.still_on(self.scaler, optimizer)
        # nobody called `before_step`: late is better than never
        with self._beside:
            if not self.recorder.gradients_seen:
                self.recorder.before_step(scales.current(self.scaler), scaled=scaled)
                self._rate = _rate(optimizer)
            self.recorder.at_optimizer(scales.current(self.scaler) if scaled else None, optimizer)

    def _backward_begins(self, gradient: Tensor) -> None:
        with self._beside:
            self.recorder.look_for_stale_gradients()

    def _forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the inputs of a forward pass in training mode."""
        self._layers.looking = model.training
        if not model.training:
            return
        with self._beside:
            self._layers.begin_micro_batch(first=not self._losses)
            self.recorder.start_clock()
        self._inputs = {k: v for k, v in kwargs.items() if isinstance(v, Tensor)}
        if args and isinstance(args[0], Tensor):
            self._inputs.setdefault("input_ids", args[0])
        self._labels = self._inputs.get("labels")

    def _forward_done(self, model: nn.Module, args: Any, output: Any) -> None:
        self._layers.looking = True


class _Beside(contextlib.ContextDecorator):
    """Around the guard's own work in a loop: what goes wrong is told to `end`, and does not reach the loop."""

    def __init__(self, end: Callable[[GuardError], None]) -> None:
        self._end = end

    def __enter__(self) -> None:
        """Nothing needs to be set up."""

    def __exit__(
        self, type_: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, GuardError):
            return False
        self._end(error)
        return True


def observe_accelerate(accelerator: Any, model: nn.Module, optimizer: Any, **more: Any) -> Observer:
    """Observe a plain accelerate loop without changing it; `model` and `optimizer` are the prepared ones.

    `accelerator.backward` and `optimizer.step` report to the Observer until it is detached. `more` are arguments of
    Observer.
    """
    steps = accelerator.gradient_accumulation_steps
    known = {"scaler": accelerator.scaler, "gradient_accumulation_steps": steps}
    observer = Observer(accelerator.unwrap_model(model), optimizer, **(known | more))

    def backward(original: Callable[..., Any], loss: Tensor, *args: Any, **kwargs: Any) -> Any:
        observer.micro_batch(loss)
        result = original(loss, *args, **kwargs)
        if accelerator.sync_gradients:
            observer.before_step()
        return result

    def step(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        if accelerator.sync_gradients:
            observer.after_step()
        return result

    observer.on_detach(_wrapped(accelerator, "backward", backward))
    observer.on_detach(_wrapped(optimizer, "step", step))
    return observer


def _wrapped(thing: Any, name: str, around: Callable[..., Any]) -> Callable[[], None]:
    """Replace a method of `thing` with `around(original, ...)`; returns a function that restores it."""
    original, own = getattr(thing, name), vars(thing).get(name)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    def undo() -> None:
        # somebody else may have wrapped it again
        if vars(thing).get(name) is not wrapped:
            return
        if own is None:
            delattr(thing, name)
        else:
            setattr(thing, name, own)

    setattr(thing, name, wrapped)
    return undo


def _rate(optimizer: torch.optim.Optimizer | None) -> float | None:
    return float(optimizer.param_groups[0]["lr"]) if optimizer is not None and optimizer.param_groups else None
