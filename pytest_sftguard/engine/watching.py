"""Watching a Trainer: tells a Recorder what happens, from inside the training loop.

Some methods of the one Trainer at hand are wrapped, none is replaced: `compute_loss` (the raw loss, before
`logging_nan_inf_filter`), `training_step` (what the loop adds up), `accelerator.backward` (the last one of a step
leaves complete, unclipped gradients, before a callback or clipping can touch them) and `optimizer.step`. Where a
subclass does its own backward, gradients are looked at before clipping, or else before the optimizer's step.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.amp.grad_scaler import OptState
from transformers import TrainerCallback

from pytest_sftguard.engine.adapters import lora_layers, product_layers
from pytest_sftguard.engine.fingerprints import fingerprint
from pytest_sftguard.engine.first_step import FirstStep
from pytest_sftguard.engine.recording import Recorder
from pytest_sftguard.engine.schedules import Schedule
from pytest_sftguard.engine.tensors import dtype_name
from pytest_sftguard.records import LogRecord

if TYPE_CHECKING:
    from transformers import Trainer


_BATCHES_KEPT = 32
"""Micro-batches that are remembered for the looks after the training; a few hundred rows of integers."""
STEP = "sftguard_step"
"""Key of a remembered micro-batch that holds the number of its optimizer step."""


class Watch(TrainerCallback):  # type: ignore[misc] # transformers types its callbacks as Any
    """Attaches a Recorder to `trainer`; `progress` is told the number of each step that is done."""

    def __init__(self, trainer: Trainer, recorder: Recorder, progress: Callable[[int], None] | None = None) -> None:
        self.trainer, self.recorder, self.progress = trainer, recorder, progress
        self._returned: dict[str, set[int]] = {}
        self.autocast_dtype: str | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        self.schedule: Schedule | None = None
        self._watched: Any = None
        self._in_training_step = False
        self.batches: list[dict[str, Any]] = []
        self._looking = False
        self.first_step = FirstStep(trainer, recorder.model)
        self._padding = _padding(recorder.model)
        trainer.compute_loss = self._compute_loss(trainer.compute_loss)
        trainer.training_step = self._training_step(trainer.training_step)
        trainer.accelerator.backward = self._backward(trainer.accelerator.backward)
        trainer.accelerator.clip_grad_norm_ = self._before(trainer.accelerator.clip_grad_norm_)
        trainer.add_callback(self)
        self.micro_batches_per_epoch: int | None = None
        self._hooks = [*self._watch_layers(), *self._watch_buffers()]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The optimizer is there now, and wrapped by accelerate."""
        self.micro_batches_per_epoch = _length(kwargs.get("train_dataloader"))
        prepared = self.trainer.optimizer
        self.optimizer = getattr(prepared, "optimizer", prepared)
        if prepared is not self._watched:  # a retry after out-of-memory begins the training again
            self._watched = prepared
            self.schedule = Schedule(kwargs.get("lr_scheduler"))
            prepared.step = self._optimizer_step(self._before(prepared.step))

    @property
    def compute_dtypes(self) -> dict[str, int]:
        """Types of what the adapted layers' products returned, with the number of layers."""
        return {dtype: len(layers) for dtype, layers in self._returned.items()}

    def detach(self) -> None:
        """Take the hooks off the model; the Trainer at hand stays wrapped."""
        for hook in self._hooks:
            hook.remove()

    def log(self) -> tuple[LogRecord, ...]:
        """What the Trainer logged, line by line, without its summary."""
        return tuple(
            LogRecord(step=line["step"], **{k: _float(line.get(k)) for k in ("loss", "grad_norm", "learning_rate")})
            for line in self.trainer.state.log_history
            if "loss" in line
        )

    def _compute_loss(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def wrapped(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if not self._in_training_step:  # an evaluation
                return original(model, inputs, *args, **kwargs)
            labels = inputs.get("labels") if hasattr(inputs, "get") else None
            self._keep(inputs)
            self._looking = True
            rows = fingerprint(inputs, self._padding)
            look = contextlib.nullcontext() if self.recorder.steps else self.first_step.watching(inputs)
            try:
                with look:
                    result = original(model, inputs, *args, **kwargs)
            finally:
                self._looking = False
            loss = result[0] if isinstance(result, tuple) else result
            self.recorder.micro_batch(loss, labels if isinstance(labels, torch.Tensor) else None, rows)
            return result

        return wrapped

    def _keep(self, inputs: Any) -> None:
        """Remember the first micro-batches as the model is given them: the tensors themselves, no copies."""
        if len(self.batches) < _BATCHES_KEPT and hasattr(inputs, "items"):
            self.batches.append({**inputs, STEP: len(self.recorder.steps) + 1})

    def _training_step(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.recorder.begin_micro_batch()
            self._in_training_step = True
            try:
                returned = original(*args, **kwargs)
            finally:
                self._in_training_step = False
            self.recorder.micro_batch_done(returned)
            return returned

        return wrapped

    def _backward(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if self.trainer.accelerator.sync_gradients:
                self.recorder.before_step(self._loss_scale())
            return result

        return wrapped

    def _before(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Look at the gradients before `original`, unless they were seen when they were complete."""

        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if not self.recorder.gradients_seen:
                self.recorder.before_step(self._loss_scale())
            return original(*args, **kwargs)

        return wrapped

    def _optimizer_step(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            optimizer = self.optimizer
            assert optimizer is not None  # set in on_train_begin, where this wrapper is put in place
            groups = optimizer.param_groups
            rate = float(groups[0]["lr"]) if groups else None
            self.recorder.at_optimizer(self._loss_scale() if self._still_scaled() else None)
            result = original(*args, **kwargs)
            self.recorder.after_step(optimizer, rate, self._loss_scale())
            if self.progress is not None:
                self.progress(len(self.recorder.steps))
            return result

        return wrapped

    @property
    def scaler(self) -> Any:
        """The loss scaler, where there is one and it is switched on: one that is off scales by 1 and skips nothing."""
        scaler = self.trainer.accelerator.scaler
        return scaler if scaler is not None and scaler.is_enabled() else None

    def _loss_scale(self) -> torch.Tensor | None:
        if self.scaler is None:
            return None
        scale = getattr(self.scaler, "_scale", None)  # `get_scale` would wait for the device, twice a step
        return scale if isinstance(scale, torch.Tensor) else torch.tensor(float(self.scaler.get_scale()))

    def _still_scaled(self) -> bool:
        """Whether the gradients are still multiplied by the loss scale: only clipping unscales them early."""
        states = getattr(self.scaler, "_per_optimizer_states", {})
        state = states.get(id(self.optimizer), {})
        return self.scaler is not None and state.get("stage", OptState.READY) is OptState.READY

    def _watch_layers(self) -> list[Any]:
        """Hooks that note which layers a token passed through: an expert without one has no gradient, soundly.

        And of what type their products are. Where the product is a module within the layer, one hook does for both.
        """
        products = {id(layer): layer for layer in product_layers(self.recorder.model)}
        hooks = []
        for name, layer in lora_layers(self.recorder.model).items():
            product = products.pop(id(layer.base_layer), None)
            if product is None:
                hooks.append(layer.register_forward_pre_hook(self._note_use(name)))
            else:
                hooks.append(product.register_forward_hook(self._note_product(name)))
        return hooks + [layer.register_forward_hook(self._note_product("")) for layer in products.values()]

    def _note_use(self, name: str) -> Callable[..., None]:
        def note(module: Any, inputs: Any, output: Any = None) -> None:
            if not (inputs and isinstance(inputs[0], torch.Tensor) and not inputs[0].numel()):
                self.recorder.used_layers.add(name)

        return note

    def _note_product(self, name: str) -> Callable[..., None]:
        """Note the type of what the layer returned, and that a token passed through the layer called `name`."""
        seen: set[Any] = set()

        def note(module: Any, inputs: Any, output: Any) -> None:
            if name and not (inputs and isinstance(inputs[0], torch.Tensor) and not inputs[0].numel()):
                self.recorder.used_layers.add(name)
            if not self._looking or not isinstance(output, torch.Tensor):
                return
            kind = output.device.type
            what = (output.dtype, torch.is_autocast_enabled(kind))
            if what not in seen:
                seen.add(what)
                self._returned.setdefault(dtype_name(output.dtype), set()).add(id(module))
                if what[1]:
                    self.autocast_dtype = dtype_name(torch.get_autocast_dtype(kind))

        return note

    def _watch_buffers(self) -> list[Any]:
        """Hooks that note which buffers outside the state dict the model's own forward pass rewrites.

        Rotary frequencies that follow the length of the batch (dynamic, longrope) are such: working memory, no base.
        """
        model = self.recorder.model
        places = [(n, m, b) for n, m in model.named_modules() for b in m._non_persistent_buffers_set]
        before: list[Any] = []

        def versions() -> list[Any]:
            tensors = [m._buffers.get(b) for _, m, b in places]
            return [t if t is None else (t, t._version) for t in tensors]  # the tensor itself: ids are used again

        def remember(module: Any, inputs: Any) -> None:
            before[:] = versions()

        def compare(module: Any, inputs: Any, output: Any) -> None:
            for (name, _, buffer), old, new in zip(places, before, versions(), strict=True):
                if (old is None) != (new is None) or (old and new and (old[0] is not new[0] or old[1] != new[1])):
                    self.recorder.rewritten.add(f"{name}.{buffer}" if name else buffer)

        if not places:
            return []
        return [model.register_forward_pre_hook(remember), model.register_forward_hook(compare)]


def _padding(model: Any) -> int | None:
    padding = getattr(getattr(model, "config", None), "pad_token_id", None)
    return padding if isinstance(padding, int) else None


def _length(dataloader: Any) -> int | None:
    try:
        return len(dataloader)
    except TypeError:  # a stream has none
        return None


def _float(value: Any) -> float | None:
    return None if value is None else float(value)
