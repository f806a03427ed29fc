"""The forward passes of the first step: whether they draw random numbers, and what the loss averages.

In the first step every run of a target still has the same weights, so that runs can be compared exactly, unless its
forward passes are random. Nothing here draws a number, changes a tensor or keeps the graph.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import random
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from pytest_sftguard.engine.adapter.adapters import lora_layers
from pytest_sftguard.engine.after import forwards
from pytest_sftguard.engine.surroundings.errors import own_work
from pytest_sftguard.engine.tensors.reductions import dtype_name
from pytest_sftguard.records import FirstStepRecord

if TYPE_CHECKING:
    from transformers import Trainer

_LIBRARIES = ("transformers", "trl", "sentence_transformers")
_BY_TYPE = ((torch, "bernoulli"), (torch, "rand"), (torch, "rand_like"), (Tensor, "uniform_"))
"""Functions of torch that make other numbers of the same state of a CPU's generator for each type. Measured: those of
normal distributions are the same but for rounding, and dropout's the same."""
_TOKENS = 256
"""Rows of logits that are widened to float32 together: 150 MB for a vocabulary of 150,000."""


class _Noise:
    """Notes the first function that draws numbers in half precision which float32 would draw otherwise."""

    drawn = ""

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Note what is drawn within."""
        # a mode of torch's would be the place of every warning that a function of torch gives
        with contextlib.ExitStack() as stack:
            for owner, name in _BY_TYPE:
                stack.enter_context(mock.patch.object(owner, name, self._noted(getattr(owner, name))))
            yield

    def _noted(self, draw: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(draw)
        def noted(*args: Any, **kwargs: Any) -> Any:
            result = draw(*args, **kwargs)
            if getattr(result, "dtype", None) in (torch.bfloat16, torch.half):
                self.drawn = self.drawn or draw.__name__
            return result

        return noted


class FirstStep:
    """Observes the loss of the first step's micro-batches."""

    def __init__(self, trainer: Trainer, model: nn.Module) -> None:
        self._model = model
        self.shifts = _shifts(model)
        """Whether the model's own loss is that of the next token."""
        self._smoothing = float(getattr(trainer.args, "label_smoothing_factor", 0.0) or 0.0)
        self._random = ""
        self._noise = _Noise()
        # a compiler would take up the wrappers
        self._compiled = bool(getattr(trainer.args, "torch_compile", False))
        self._model_loss = _model_of_loss(trainer, model)
        self._loss_library = _library_of_loss(trainer)
        self._counts: list[Tensor] = []
        self._sums: list[tuple[Tensor, Tensor]] = []
        self._labels: list[Tensor] = []
        self._complete = True
        self._begun = False
        self._sampled = False
        self.given: dict[str, Any] | None = None
        """Arguments of the first forward pass of the training, by name; None where the model itself was not called."""

        self._own_loss: Any = None
        self._has_own_loss = False
        self._loss_dtype, self._loss_class = "", ""

    @contextlib.contextmanager
    def watching(self, inputs: Any) -> Iterator[None]:
        """Observe the computation of the loss of `inputs`, which may pop the labels."""
        outputs: list[Any] = []
        with own_work:
            self._sampled |= hasattr(inputs, "get") and inputs.get("advantages") is not None
            labels = inputs.get("labels") if hasattr(inputs, "get") and "shift_labels" not in inputs else None
            hooks = [self._model.register_forward_hook(lambda module, args, output: outputs.append(output))]
            if not self._begun:
                hooks += [self._model.register_forward_pre_hook(self._keep, with_kwargs=True), *self._watch_random()]
        try:
            with contextlib.nullcontext() if self._begun or self._compiled else self._noise.watching():
                yield
        finally:
            for hook in hooks:
                hook.remove()
        self._seen(outputs, labels)

    @own_work
    def _seen(self, outputs: list[Any], labels: Any) -> None:
        """Note what the passes of a micro-batch returned."""
        if not self._begun:
            self._note("model")
            # a hook that clips or drops depends on the micro-batch, and no two splits have the same ones
            if not self._random and any(_has_hooks(p) for p in self._model.parameters()):
                self._random = "adapter"
        self._begun = True
        logits = logits_of(outputs[0]) if len(outputs) == 1 else None
        self._own_loss = _member(outputs[0], "loss") if len(outputs) == 1 else None
        self._has_own_loss = self._has_own_loss or self._own_loss is not None
        self._average(logits, labels)

    @own_work
    def _keep(self, module: Any, args: Any, kwargs: Any) -> None:
        if self.given is None:
            self.given = forwards.given(self._model, args, kwargs)

    @own_work
    def returned(self, loss: Tensor) -> None:
        """Note the type of the loss that the Trainer computed, and whose it is."""
        own, self._own_loss = self._own_loss, None
        if self._loss_dtype:
            return
        self._loss_dtype = dtype_name(loss.dtype)
        if isinstance(own, Tensor) and torch.equal(own.detach(), loss.detach()):
            self._loss_class = _class_in_transformers(self._model)

    @property
    def told_by_logits_alone(self) -> bool:
        """Whether code of the user's own computes the loss from logits of one pass, whose output holds no loss."""
        return self._complete and bool(self._sums) and not self._has_own_loss and not self._loss_library

    @own_work
    def record(self) -> FirstStepRecord | None:
        """Record of the first step; None if there was none."""
        if not self._begun:
            return None
        known = self._complete and bool(self._sums)
        tokens: tuple[int, ...] = tuple(int(c) for c in self._counts) if known else ()
        total: int = sum(tokens)
        sums = [float(s) for s, _ in self._sums] if known else []
        return FirstStepRecord(
            random=self._random,
            noise=self._noise.drawn,
            sampled=self._sampled,
            loss_dtype=self._loss_dtype,
            loss_class=self._loss_class,
            loss_undivided=bool(self._loss_class) and _takes_the_mean(self._model),
            micro_tokens=tokens,
            labels=sum(int(n) for _, n in self._sums) if known else None,
            micro_token_losses=tuple(s / n if n else 0.0 for s, n in zip(sums, tokens, strict=True)),
            token_loss=sum(sums) / total if total else None,
            label_entropy=self._entropy() if total else None,
            model_loss=self._model_loss,
            loss_library=self._loss_library,
        )

    def _watch_random(self) -> list[Any]:
        self._state = _random_state(self._model)
        dropouts = [
            m
            for layer in lora_layers(self._model).values()
            for m in getattr(layer, "lora_dropout", nn.ModuleDict()).modules()
            if isinstance(m, nn.Dropout)
        ]
        hooks: list[Any] = [d.register_forward_pre_hook(lambda *a: self._note("model")) for d in dropouts]
        return hooks + [d.register_forward_hook(lambda *a: self._note("adapter")) for d in dropouts]

    @own_work
    def _note(self, where: str) -> None:
        """Compare the generators with their last state: numbers drawn since then were drawn at `where`."""
        if self._random == "model":
            return
        now = _random_state(self._model)
        if now != self._state:
            self._random, self._state = where, now

    def _average(self, logits: Tensor | None, labels: Any) -> None:
        known = isinstance(labels, Tensor) and labels.dim() == 2 and not labels.is_floating_point()
        rows = self._rows(logits.detach(), labels.to(logits.device)) if known and logits is not None else None
        if rows is None:
            self._complete = False
            return
        total = torch.zeros((), dtype=torch.float64, device=labels.device)
        for row, marks in rows:
            with torch.no_grad(), torch.autocast(row.device.type, enabled=False):
                counted = (marks >= 0) & (marks < row.shape[-1])
                self._complete &= bool((counted == (marks != -100)).all())
                self._labels.append(marks[counted])
                for part, wanted in zip(*(torch.split(t[counted], _TOKENS) for t in (row, marks)), strict=True):
                    total += self.cross_entropy(part.float(), wanted).to(total.device)
        self._counts.append((labels[:, 1:] != -100 if self.shifts else labels != -100).sum())
        self._sums.append((total, (labels != -100).sum()))

    def _rows(self, logits: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]] | None:
        """Logits, shape (tokens, words), and the label that each predicts; None if their shapes do not match."""
        if logits.shape[:-1] == labels.shape:
            pairs = list(zip(logits, labels, strict=True))
            return [(row[:-1], marks[1:]) for row, marks in pairs] if self.shifts else pairs
        wanted = labels[:, 1:] if self.shifts else labels
        there = wanted[wanted != -100]
        # the model may compute logits only for tokens with a label
        if logits.shape[:-1].numel() == len(there):
            return [(logits.flatten(0, -2), there)]
        return None

    def cross_entropy(self, logits: Tensor, wanted: Tensor) -> Tensor:
        """Sum of the cross-entropy of `logits`, shape (tokens, words), over the labels `wanted` that are not -100."""
        return nn.functional.cross_entropy(logits, wanted, reduction="sum", label_smoothing=self._smoothing).double()

    def _entropy(self) -> float:
        counts = torch.unique(torch.cat(self._labels), return_counts=True)[1].double()
        shares = counts / counts.sum()
        return float(-(shares * shares.log()).sum()) + 0.0


def _model_of_loss(trainer: Any, model: nn.Module) -> str:
    """Class of the model where its own loss is the one that counts; empty where anybody else has a hand in it."""
    from transformers import Trainer

    own = "compute_loss" in vars(trainer) or type(trainer).compute_loss is not Trainer.compute_loss
    own = own or "training_step" in vars(trainer) or type(trainer).training_step is not Trainer.training_step
    helped = getattr(trainer, "compute_loss_func", None) is not None or getattr(trainer, "label_smoother", None)
    return "" if own or helped else type(forwards.inner(model)).__name__


def _library_of_loss(trainer: Any) -> str:
    """The package whose own code computes the Trainer's loss, such as transformers or trl; empty if the user's does."""
    code = getattr(trainer, "compute_loss_func", None) or type(trainer).compute_loss
    package = str(getattr(code, "__module__", "")).partition(".")[0]
    return package if package in _LIBRARIES and "compute_loss" not in vars(trainer) else ""


def _shifts(model: Any) -> bool:
    """Whether the model's own loss function predicts the next token; the Trainer may be wrong about it."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    inner = forwards.inner(model)
    causal = getattr(inner, "loss_function", None) is ForCausalLMLoss
    return causal and not getattr(getattr(inner, "config", None), "is_encoder_decoder", False)


def logits_of(output: Any) -> Tensor | None:
    """Logits of shape (rows, tokens, words) in the output of a model; None if it has none."""
    logits = _member(output, "logits")
    return logits if isinstance(logits, Tensor) and logits.dim() == 3 else None


def _member(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, dict) else getattr(output, name, None)


def _class_in_transformers(model: nn.Module) -> str:
    """Class of the model if it computes its loss by code of transformers that nobody has replaced; empty otherwise."""
    inner = forwards.inner(model)
    code = [type(inner), type(inner).forward, getattr(inner, "loss_function", type(inner))]
    own = all(str(getattr(c, "__module__", "")).startswith("transformers.") for c in code)
    return type(inner).__name__ if own and "forward" not in vars(inner) else ""


def _takes_the_mean(model: nn.Module) -> bool:
    """Whether the forward pass makes a `CrossEntropyLoss` itself, and does not ask the model's loss function."""
    code = getattr(inspect.unwrap(type(forwards.inner(model)).forward), "__code__", None)
    names = () if code is None else code.co_names
    return "CrossEntropyLoss" in names and "loss_function" not in names


def _has_hooks(parameter: Tensor) -> bool:
    """Whether somebody's function changes the gradient of each micro-batch."""
    return parameter.requires_grad and bool(parameter._backward_hooks)


def _random_state(model: nn.Module) -> tuple[Any, ...]:
    device = next(model.parameters()).device
    states: list[Any] = [torch.get_rng_state().numpy().tobytes(), random.getstate()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device).numpy().tobytes())
    held = (v for m in model.modules() for v in vars(m).values() if isinstance(v, torch.Generator))
    states += [g.get_state().numpy().tobytes() for g in held]
    state: Any = np.random.get_state()
    name, keys, *rest = state
    return (*states, name, keys.tobytes(), *rest)
