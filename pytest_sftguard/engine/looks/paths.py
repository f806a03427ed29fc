"""One micro-batch computed twice: as the training computes it, and with plain kernels and a plain loss."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pytest_sftguard.engine.adapter.adapters import eager, trainables
from pytest_sftguard.engine.after import forwards
from pytest_sftguard.engine.data.rows import IGNORED
from pytest_sftguard.engine.looks import InapplicableError, Look
from pytest_sftguard.engine.stages import Started
from pytest_sftguard.records import Names, PathRecord, PathsRecord

_LOSS_RTOL = 1e-5
"""Largest relative difference at which the Trainer's loss counts as the cross-entropy of the same logits.

Measured: 1e-7 in every precision, and 4e-4 with the auxiliary term of a target's own loss.
"""
_SMALL = 1e-3
"""Share of the largest gradient norm below which the error is taken relative to that share: such sums cancel."""


class _Done(BaseException):
    """Ends the training of the look's own model; no `except Exception` catches it."""


class Paths(Look[Started]):
    """Builds the target again, starts its training, and computes loss and gradients in place of the first step."""

    def conclude(self, reached: Started) -> dict[str, Any]:
        """Train up to the first micro-batch, and compare there."""
        if not reached.batches:
            raise InapplicableError("no micro-batch of the training was seen")
        batch = {k: v for k, v in reached.batches[0].items() if not k.startswith("sftguard")}
        arithmetic = forwards.arithmetic(reached.mode, autocast=reached.mode.autocast)
        trainer: Any = reached.build("paths", gradient_accumulation_steps=1)
        without_noise(trainer)
        found: list[PathsRecord] = []
        original = trainer.training_step

        def once(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            counted = kwargs.get("num_items_in_batch", args[0] if args else None) is not None
            found.append(_FirstStep(trainer, arithmetic, model, original, batch, counted).record())
            raise _Done

        trainer.training_step = once
        with contextlib.suppress(_Done):
            trainer.train()
        if not found:
            raise InapplicableError("the Trainer did not call its own training_step")
        return {"paths": found[0]}


def without_noise(trainer: Any) -> None:
    """Switch off dropout and other noise of a model that nobody else uses, and fill its zero factors."""
    trainer.args.neftune_noise_alpha = None
    generator = torch.Generator().manual_seed(0)
    for module in trainer.model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    with torch.no_grad():
        for parameter in trainables(trainer.model).values():
            # while lora_B is zero, so is the gradient of lora_A
            if not parameter.count_nonzero():
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


class _FirstStep:
    """The model at its first step, whose loss and gradients can be computed along several paths."""

    def __init__(
        self, trainer: Any, arithmetic: str, model: Any, step: Callable[..., Any], batch: dict[str, Any], counted: bool
    ) -> None:
        self.trainer, self.arithmetic, self.model, self.step, self.batch = trainer, arithmetic, model, step, batch
        # without compile
        self.plain = getattr(model, "_orig_mod", model)
        labels = batch.get("labels")
        self.items = (labels[..., 1:] != IGNORED).sum() if counted and isinstance(labels, Tensor) else None

    def record(self) -> PathsRecord:
        """Compute the training's own path, and compare the plain ones with it."""
        attention, checkpointing = forwards.attention_of(self.plain), bool(forwards.checkpointing(self.plain))
        switched = [attention] if attention not in ("", "eager") else []
        switched += ["checkpointing"] if checkpointing else []
        switched += ["compile"] if self.plain is not self.model else []
        loss, gradients = self._own(self.model)
        record = PathsRecord(
            arithmetic=self.arithmetic,
            attention=attention,
            switched=tuple(switched),
            routed=forwards.has_experts(self.plain),
            tensors=sum(g is not None for g in gradients.values()),
            loss=loss,
            nonfinite=_nonfinite(gradients),
            asked=0,
        )
        with torch.no_grad():
            usual = self._cross_entropy()
        comparable = usual is not None and math.isclose(usual.item(), loss, rel_tol=_LOSS_RTOL, abs_tol=1e-6)
        paths = []
        with _plainly(self.plain):
            paths.append(_compared("plain kernels", *self._own(self.plain), gradients))
            if comparable and (plain_loss := self._cross_entropy()) is not None:
                paths.append(_compared("plain loss", *self._backward(plain_loss), gradients))
        return dataclasses.replace(record, asked=len(paths), paths=tuple(paths))

    def _own(self, model: Any) -> tuple[float, dict[str, Tensor | None]]:
        """Take the Trainer's own training step, with the loss scale lowered until no gradient overflows."""
        scaler = self._scaler
        while True:
            self._clear()
            items = {} if self.items is None else {"num_items_in_batch": self.items}
            loss = self.step(model, dict(self.batch), **items)
            scale = self._scale
            gradients = self._gradients(scale)
            if scaler is None or scale <= 1 or not _nonfinite(gradients):
                return float(loss), gradients
            scaler._scale.fill_(max(1.0, scale / 16))

    def _backward(self, loss: Tensor) -> tuple[float, dict[str, Tensor | None]]:
        """Return a loss that was computed plainly, and its gradients."""
        self._clear()
        # torch does not type this method
        (loss * self._scale).backward()  # type: ignore[no-untyped-call]
        return loss.item(), self._gradients(self._scale)

    def _cross_entropy(self) -> Tensor | None:
        """Return the mean cross-entropy of the next token, in float32; None without such labels or logits."""
        labels = self.batch.get("labels")
        if not (isinstance(labels, Tensor) and labels.ndim == 2 and not labels.is_floating_point()):
            return None
        accepted = forwards.accepts(self.plain) - {"labels"}
        inputs = self.trainer._prepare_inputs({k: v for k, v in self.batch.items() if k in accepted})
        self.plain.train()
        with self.trainer.compute_loss_context_manager():
            logits = getattr(self.plain(**inputs), "logits", None)
        if not isinstance(logits, Tensor) or logits.shape[:2] != labels.shape:
            return None
        wanted = labels[:, 1:].reshape(-1).to(logits.device)
        return functional.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]).float(), wanted)

    @property
    def _scaler(self) -> Any:
        scaler = self.trainer.accelerator.scaler
        return scaler if scaler is not None and scaler.is_enabled() else None

    @property
    def _scale(self) -> float:
        return 1.0 if self._scaler is None else float(self._scaler.get_scale())

    def _clear(self) -> None:
        for parameter in self.plain.parameters():
            parameter.grad = None

    def _gradients(self, scale: float) -> dict[str, Tensor | None]:
        found = {n: p.grad for n, p in trainables(self.plain).items()}
        self._clear()
        return {n: None if g is None else _dense(g) / scale for n, g in found.items()}


def _dense(gradient: Tensor) -> Tensor:
    return (gradient.to_dense() if gradient.is_sparse else gradient).detach().float()


def _nonfinite(gradients: dict[str, Tensor | None]) -> Names:
    return Names.of(n for n, g in gradients.items() if g is not None and not bool(g.isfinite().all()))


def _compared(
    name: str, loss: float, plain: dict[str, Tensor | None], gradients: dict[str, Tensor | None]
) -> PathRecord:
    """Return the largest relative distance of a tensor's gradients on the two paths, where both are finite."""
    unusable = {*_nonfinite(plain).first, *_nonfinite(gradients).first}
    pairs = {
        n: (g, p)
        for n, g in gradients.items()
        if (p := plain.get(n)) is not None and g is not None and n not in unusable
    }
    floor = _SMALL * max((p.norm().item() for _, p in pairs.values()), default=0.0)
    largest, tensor = 0.0, ""
    for n, (g, p) in pairs.items():
        gap = (g - p).norm().item()
        change = gap / max(p.norm().item(), floor, 1e-30)
        if not change <= largest:
            largest, tensor = change, n
    # an expert that no token reaches may have no gradient on one path, and zeros on the other
    lone = {n: p if g is None else g for n, g in gradients.items() if (g is None) != ((p := plain.get(n)) is None)}
    one_sided = Names.of(n for n, g in lone.items() if g is not None and bool(g.count_nonzero()))
    bad = _nonfinite(plain)
    return PathRecord(name=name, loss=loss, max_change=largest, tensor=tensor, nonfinite=bad, one_sided=one_sided)


@contextlib.contextmanager
def _plainly(model: Any) -> Iterator[None]:
    """Use eager attention and no checkpointing, which stays off: the model is not used afterwards."""
    for module in forwards.checkpointing(model):
        module.gradient_checkpointing = False
    with eager(model):
        yield
