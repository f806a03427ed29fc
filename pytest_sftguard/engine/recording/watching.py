"""Watching a Trainer: wrappers that report to a Recorder from inside the training loop.

Some methods of this one Trainer are wrapped, none is replaced: `compute_loss` (the raw loss, before
`logging_nan_inf_filter`), `training_step` (the summands of the step's loss), `accelerator.backward` (the last call of a
step leaves complete, unclipped gradients, before a callback or clipping can change them) and `optimizer.step`. If a
subclass has its own backward pass, gradients are read before clipping, or else before the optimizer's step.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from pytest_sftguard.engine.after import forwards
from pytest_sftguard.engine.recording import scales
from pytest_sftguard.engine.recording.entropies import Entropies
from pytest_sftguard.engine.recording.first_step import FirstStep
from pytest_sftguard.engine.recording.layers import LayerWatch
from pytest_sftguard.engine.recording.offsets import only_offset
from pytest_sftguard.engine.recording.recorder import Recorder, mean
from pytest_sftguard.engine.recording.schedules import Schedule
from pytest_sftguard.engine.surroundings import devices
from pytest_sftguard.engine.surroundings.errors import own_work
from pytest_sftguard.records import LogRecord

if TYPE_CHECKING:
    from transformers import Trainer

_Method = Callable[..., Any]

_BATCHES_KEPT = 32
"""Micro-batches that are kept for the looks after the training: a few hundred rows of integers."""
STEP = "sftguard_step"
"""Key of a kept micro-batch for the number of its optimizer step."""


# transformers types its callbacks as Any
class Watch(TrainerCallback):  # type: ignore[misc]
    """Attaches a Recorder to `trainer`; calls `progress` with the number of each finished step."""

    @own_work
    def __init__(self, trainer: Trainer, recorder: Recorder, progress: Callable[[int], None] | None = None) -> None:
        self.trainer, self.recorder, self.progress = trainer, recorder, progress
        self.optimizer: torch.optim.Optimizer | None = None
        self.schedule: Schedule | None = None
        self._watched: Any = None
        self._in_training_step = False
        self.batches: list[dict[str, Any]] = []
        self._copies: list[dict[str, Any]] = []
        self.first_step = FirstStep(trainer, recorder.model)
        self.entropies = Entropies(self.first_step, recorder.model)
        trainer.compute_loss = wrapped(trainer.compute_loss, self._compute_loss)
        trainer.training_step = wrapped(trainer.training_step, self._training_step)
        trainer.accelerator.backward = wrapped(trainer.accelerator.backward, self._backward)
        trainer.accelerator.clip_grad_norm_ = wrapped(trainer.accelerator.clip_grad_norm_, self._before)
        trainer.add_callback(self)
        self.loader: Any = None
        """The data loader of the training, as accelerate has prepared it; None before the training begins."""
        self.micro_batches_per_epoch: int | None = None
        self.layers = LayerWatch(recorder)
        self.layers.looking = False
        self._own_losses: list[Any] = []
        self._forward = recorder.model.register_forward_hook(self._note_loss)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wrap the optimizer, which accelerate has prepared by now."""
        self.loader = kwargs.get("train_dataloader")
        self.micro_batches_per_epoch = _length(self.loader)
        prepared = self.trainer.optimizer
        self.optimizer = getattr(prepared, "optimizer", prepared)
        # a retry after out-of-memory begins the training again
        if prepared is not self._watched:
            self._watched = prepared
            self.schedule = Schedule(kwargs.get("lr_scheduler"))
            prepared.step = wrapped(wrapped(prepared.step, self._before), self._optimizer_step)

    def detach(self) -> None:
        """Remove the hooks from the model; the Trainer stays wrapped."""
        self.layers.detach()
        self._forward.remove()

    def settle(self) -> None:
        """Make the host copies of the batches independent of the device, which must still answer."""
        self._copies = devices.settled(self._copies)

    def give_up_device(self) -> None:
        """Replace the batches with their host copies, after the device was lost."""
        self.batches = devices.rescued(self._copies)

    def log(self) -> tuple[LogRecord, ...]:
        """The Trainer's log, line by line, without its summary."""
        return tuple(
            LogRecord(step=line["step"], **{k: _float(line.get(k)) for k in ("loss", "grad_norm", "learning_rate")})
            for line in self.trainer.state.log_history
            if "loss" in line
        )

    def _compute_loss(self, original: _Method, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        # an evaluation
        if not self._in_training_step:
            return original(model, inputs, *args, **kwargs)
        self._keep(inputs)
        self.layers.looking, self._own_losses = True, []
        try:
            with self._watching(inputs):
                result = original(model, inputs, *args, **kwargs)
        finally:
            self.layers.looking = False
        loss = result[0] if isinstance(result, tuple) else result
        # the Trainer itself will say that this is no loss
        if isinstance(loss, Tensor):
            self._note_micro_batch(loss)
        return result

    @own_work
    def _note_micro_batch(self, loss: Tensor) -> None:
        if not self.recorder.taken:
            self.first_step.returned(loss)
        own, node = self._own_losses[0] if len(self._own_losses) == 1 else (None, None)
        # a node of the graph keeps all behind it
        self._own_losses = []
        self.recorder.micro_batch(loss, own, offset=only_offset(loss, node))

    def _watching(self, inputs: Any) -> contextlib.AbstractContextManager[None]:
        taken = self.recorder.taken
        return self.entropies.watching(taken + 1, inputs) if taken else self.first_step.watching(inputs)

    @own_work
    def _note_loss(self, module: Any, args: Any, output: Any) -> None:
        # copied at once: transformers multiplies it in place by the number of processes
        found = forwards.loss_of(output)
        self._own_losses.append((None, None) if found is None else (mean(found), found.grad_fn))

    @own_work
    def _keep(self, inputs: Any) -> None:
        """Record the inputs, and keep the first micro-batches: the tensors themselves.

        CUDA tensors also have copies on the host, in case one of their indices loses the device.
        """
        self.recorder.collated(inputs)
        if len(self.batches) < _BATCHES_KEPT and hasattr(inputs, "items"):
            self.batches.append({**inputs, STEP: self.recorder.taken + 1})
            self._copies.append(devices.copied(self.batches[-1]))

    def _training_step(self, original: _Method, *args: Any, **kwargs: Any) -> Any:
        self.layers.begin_micro_batch(first=self.recorder.begin_micro_batch())
        self._in_training_step = True
        try:
            returned = original(*args, **kwargs)
        finally:
            self._in_training_step = False
        if isinstance(returned, Tensor):
            self.recorder.micro_batch_done(returned)
        return returned

    def _backward(self, original: _Method, *args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        if self.trainer.accelerator.sync_gradients:
            self.recorder.before_step(scales.current(self.scaler))
        return result

    def _before(self, original: _Method, *args: Any, **kwargs: Any) -> Any:
        """Record the gradients before `original`, unless they were recorded when complete."""
        if not self.recorder.gradients_seen:
            self.recorder.before_step(scales.current(self.scaler))
        return original(*args, **kwargs)

    def _optimizer_step(self, original: _Method, *args: Any, **kwargs: Any) -> Any:
        optimizer = self.optimizer
        # on_train_begin sets it together with this wrapper
        assert optimizer is not None
        groups = optimizer.param_groups
        rate = float(groups[0]["lr"]) if groups else None
        still_scaled = scales.still_on(self.scaler, optimizer)
        self.recorder.at_optimizer(scales.current(self.scaler) if still_scaled else None, optimizer)
        result = original(*args, **kwargs)
        self.recorder.after_step(optimizer, rate, scales.current(self.scaler))
        if self.progress is not None:
            self.progress(self.recorder.taken)
        return result

    @property
    def scaler(self) -> Any:
        """The loss scaler, if it is enabled: a disabled one scales by 1 and skips nothing."""
        scaler = self.trainer.accelerator.scaler
        return scaler if scaler is not None and scaler.is_enabled() else None


def wrapped(original: _Method, around: _Method) -> _Method:
    """`around(original, ...)` in place of `original`, with its name and signature."""
    return functools.update_wrapper(functools.partial(around, original), original)


def _length(dataloader: Any) -> int | None:
    """Number of batches; None for a stream."""
    try:
        return len(dataloader)
    except TypeError:
        return None


def _float(value: Any) -> float | None:
    return None if value is None else float(value)
