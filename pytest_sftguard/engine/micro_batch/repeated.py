"""The first training step of a Trainer, taken without its optimizer, and its loss again as often as asked."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pytest_sftguard.engine.adapter.adapters import trainables
from pytest_sftguard.engine.after import forwards
from pytest_sftguard.engine.micro_batch.hidden import LastHidden
from pytest_sftguard.engine.micro_batch.hooks import Hook, Hooked, changed_by, without_hooks

_FILLED = 0.02
"""Standard deviation of what replaces a factor of zeros: while lora_B is zero, so is the gradient of lora_A."""


class UnaskedError(Exception):
    """A micro-batch of which a property cannot be asked; the message says why."""


class Repeated:
    """A model at its first step, with the Trainer's own loss of its own micro-batch.

    Generators are reset before each loss, so that dropout and other noise are drawn alike.
    """

    def __init__(self, trainer: Any, model: Any) -> None:
        self.trainer = trainer
        self.model: nn.Module = model
        self.plain: Any = getattr(model, "_orig_mod", model)
        self.hidden = LastHidden(self.plain)
        self.inputs: Any = None
        """The inputs of `compute_loss`, as the first call was given them."""
        self.calls = 0
        """Number of calls of `compute_loss` in the training step."""
        self.gradients: dict[str, Tensor] = {}
        """Gradient of each trainable tensor that got one, as backward made it, without hooks on the tensor."""
        self.hooked: list[Hooked] = []
        """What those hooks made of it."""
        self.uncalled: list[str] = []
        """Tensors whose hooks could not be called by hand."""
        self._compute: Callable[..., Any] = trainer.compute_loss

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every trainable tensor, by name."""
        return trainables(self.plain)

    @property
    def arithmetic(self) -> str:
        """Type of the products: `float32`, or that of autocast, or of the narrowest weights."""
        mixed = str(getattr(self.trainer.accelerator, "mixed_precision", "no"))
        if mixed != "no":
            return {"bf16": "bfloat16", "fp16": "float16"}.get(mixed, mixed)
        narrow = [p.dtype for p in self.plain.parameters() if not p.is_floating_point() or p.element_size() < 4]
        return str(narrow[0] if narrow else torch.float32).removeprefix("torch.")

    def step(self, training_step: Callable[..., Any], inputs: Any, *args: Any, **kwargs: Any) -> float:
        """Take the Trainer's training step, forward and backward, and return the loss that `compute_loss` gave."""
        losses: list[float] = []

        def compute_loss(model: Any, inputs: Any, *given: Any, **named: Any) -> Any:
            self.calls += 1
            if self.calls == 1:
                self.inputs, self._given, self._named = copied(inputs), given, named
                self._modes = [(m, m.training) for m in self.plain.modules()]
                self._restore = _snapshot()
                labels = self.inputs.get("labels") if hasattr(self.inputs, "get") else None
                self.hidden.shape = labels.shape if isinstance(labels, Tensor) else None
            result = self._compute(model, inputs, *given, **named)
            losses.append(_scalar(result))
            return result

        self.trainer.compute_loss = compute_loss
        for parameter in self.plain.parameters():
            parameter.grad = None
        try:
            with self.hidden.watched(gradient=True), without_hooks(self.tensors) as hooks:
                training_step(self.model, inputs, *args, **kwargs)
        finally:
            self.trainer.compute_loss = self._compute
        self.gradients = {n: _dense(p.grad) for n, p in self.tensors.items() if p.grad is not None}
        for name, own in hooks.items():
            self._call(own, name, self.tensors[name].grad)
        for parameter in self.plain.parameters():
            parameter.grad = None
        return losses[0] if losses else float("nan")

    def _call(self, hooks: list[Hook], name: str, gradient: Tensor | None) -> None:
        """Call the hooks of a tensor by hand."""
        if gradient is None:
            return
        try:
            found = changed_by(hooks, name, gradient)
        # somebody else's hook may need the backward pass around it
        except Exception:
            self.uncalled.append(name)
        else:
            self.hooked += [found] if found is not None else []

    def loss(self, inputs: Any = None) -> float:
        """Return the loss of `inputs`, or of the micro-batch, at the weights that the model has now."""
        self._restore()
        for module, training in self._modes:
            module.training = training
        with self.trainer.compute_loss_context_manager():
            given = copied(self.inputs if inputs is None else inputs)
            return _scalar(self._compute(self.model, given, *self._given, **self._named))

    def state(self, inputs: Any = None) -> Tensor | None:
        """Return the last hidden state for `inputs`, of shape (rows, places, features); None where none was seen."""
        with torch.no_grad(), self.hidden.watched(gradient=False):
            self.loss(inputs)
        return self.hidden.state

    @contextlib.contextmanager
    def without_checkpointing(self) -> Iterator[None]:
        """Keep activations instead of computing them again: re-entrant checkpointing runs without gradients."""
        modules = forwards.checkpointing(self.plain)
        for module in modules:
            module.gradient_checkpointing = False
        try:
            yield
        finally:
            for module in modules:
                module.gradient_checkpointing = True


def filled(model: nn.Module) -> None:
    """Fill the zero factors of a model that nobody else uses."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainables(model).values():
            if not parameter.count_nonzero():
                parameter.copy_(_FILLED * torch.randn(parameter.shape, generator=generator))


def copied(value: Any) -> Any:
    """Return a copy whose tensors have memory of their own: a loss may take labels out, or write into them."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(map(copied, value))
    if isinstance(value, Mapping):
        twin = copy.copy(value)
        if isinstance(twin, MutableMapping):
            for key in value:
                twin[key] = copied(value[key])
        return twin
    return value


def _snapshot() -> Callable[[], None]:
    host, python, numpy_state = torch.get_rng_state(), random.getstate(), np.random.get_state()
    there = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

    def restore() -> None:
        torch.set_rng_state(host)
        random.setstate(python)
        np.random.set_state(numpy_state)
        if there:
            torch.cuda.set_rng_state_all(there)

    return restore


def _scalar(result: Any) -> float:
    loss = result[0] if isinstance(result, tuple) else result
    # this detach is none of the loss's own, see `stops`
    with torch.no_grad():
        return float(loss.float().mean()) if isinstance(loss, Tensor) else float(loss)


def _dense(gradient: Tensor) -> Tensor:
    return (gradient.to_dense() if gradient.is_sparse else gradient).detach().float().clone()
