"""One micro-batch computed twice: as the training computes it, and plainly, kernel by kernel."""

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
from pytest_sftguard.engine.looks import InapplicableError, Look, Scene
from pytest_sftguard.records import Names, PathRecord, PathsRecord

_LOSS_RTOL = 1e-5
"""How near the Trainer's loss must be to the cross-entropy of the same logits, to be taken for it.

Measured, they are 1e-7 apart in every precision; an auxiliary term of a loss of one's own made 4e-4.
"""
_SMALL = 1e-3
"""Gradients whose norm is below this share of the largest are compared at that scale: they are sums that cancel."""
_IGNORED = -100


class _Done(BaseException):
    """Ends the training of the look's own model; nothing catches it on the way."""


class Paths(Look):
    """Builds the target anew, begins its training, and computes loss and gradients where its first step would."""

    def conclude(self, scene: Scene) -> dict[str, Any]:
        """Train up to the first micro-batch, and compare there."""
        assert scene.watch is not None
        if not scene.watch.batches:
            raise InapplicableError("no micro-batch of the training was seen")
        batch = {k: v for k, v in scene.watch.batches[0].items() if not k.startswith("sftguard")}
        trainer: Any = scene.build("paths", gradient_accumulation_steps=1)
        without_noise(trainer)
        found: list[PathsRecord] = []
        original = trainer.training_step

        def once(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            counted = kwargs.get("num_items_in_batch", args[0] if args else None) is not None
            found.append(_Crossroads(trainer, scene, model, original, batch, counted).record())
            raise _Done

        trainer.training_step = once
        with contextlib.suppress(_Done):
            trainer.train()
        if not found:
            raise InapplicableError("the Trainer took no training step of the usual kind")
        return {"paths": found[0]}


def without_noise(trainer: Any) -> None:
    """Take dropout and its like out of a model that nobody else uses, and have each factor matter."""
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
            if not parameter.count_nonzero():  # lora_B: at its zero start the gradient of lora_A would be zero
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


class _Crossroads:
    """The model at its first step, and the ways that lead on from there."""

    def __init__(
        self, trainer: Any, scene: Scene, model: Any, step: Callable[..., Any], batch: dict[str, Any], counted: bool
    ) -> None:
        self.trainer, self.scene, self.model, self.step, self.batch = trainer, scene, model, step, batch
        self.plain = getattr(model, "_orig_mod", model)  # without compile
        labels = batch.get("labels")
        self.items = (labels[..., 1:] != _IGNORED).sum() if counted and isinstance(labels, Tensor) else None
        self.arithmetic = forwards.arithmetic(scene.mode, autocast=scene.mode.autocast)

    def record(self) -> PathsRecord:
        """Everything, on every way."""
        attention, checkpointing = forwards.attention_of(self.plain), bool(forwards.checkpointing(self.plain))
        switched = [attention] if attention not in ("", "eager") else []
        switched += ["checkpointing"] if checkpointing else []
        switched += ["compile"] if self.plain is not self.model else []
        loss, gradients = self._own(self.model)
        record = PathsRecord(
            arithmetic=self.arithmetic, attention=attention, switched=tuple(switched),
            routed=forwards.has_experts(self.plain),
            tensors=sum(g is not None for g in gradients.values()),
            loss=loss, nonfinite=_nonfinite(gradients), asked=0,
        )  # fmt: skip
        with torch.no_grad():
            usual = self._cross_entropy()
        plain_loss = usual is not None and math.isclose(usual.item(), loss, rel_tol=_LOSS_RTOL, abs_tol=1e-6)
        paths = []
        with _plainly(self.plain):
            paths.append(_compared("plain kernels", *self._own(self.plain), gradients))
            if plain_loss:
                paths.append(_compared("plain loss", *self._written_out(), gradients))
        return dataclasses.replace(record, asked=len(paths), paths=tuple(paths))

    def _own(self, model: Any) -> tuple[float, dict[str, Tensor | None]]:
        """The Trainer's own training step, under as large a loss scale as does not overflow."""
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

    def _written_out(self) -> tuple[float, dict[str, Tensor | None]]:
        """Loss and gradients of the cross-entropy written out."""
        self._clear()
        loss = self._cross_entropy()
        assert loss is not None  # it was the same as the Trainer's a moment ago
        (loss * self._scale).backward()  # type: ignore[no-untyped-call]
        return loss.item(), self._gradients(self._scale)

    def _cross_entropy(self) -> Tensor | None:
        """Mean cross-entropy of the next token, in float32; None where the batch or the model has no such thing."""
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
    """The largest distance between two gradients of one tensor, of those that are finite on both ways."""
    bad = {*_nonfinite(plain).first, *_nonfinite(gradients).first}
    pairs = {
        n: (g, p) for n, g in gradients.items() if (p := plain.get(n)) is not None and g is not None and n not in bad
    }
    floor = _SMALL * max((p.norm().item() for _, p in pairs.values()), default=0.0)
    largest, tensor = 0.0, ""
    for n, (g, p) in pairs.items():
        gap = (g - p).norm().item()
        change = gap / max(p.norm().item(), floor, 1e-30)
        if not change <= largest:
            largest, tensor = change, n
    # an expert that no token reaches has no gradient on one way, and zeros on another
    one_sided = [
        n
        for n, g in gradients.items()
        if (g is None) != (plain.get(n) is None) and _matters(g) | _matters(plain.get(n))
    ]
    return PathRecord(
        name=name, loss=loss, max_change=largest, tensor=tensor, nonfinite=_nonfinite(plain),
        one_sided=Names.of(one_sided),
    )  # fmt: skip


def _matters(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(gradient.count_nonzero())


@contextlib.contextmanager
def _plainly(model: Any) -> Iterator[None]:
    """Eager attention and no checkpointing; the model is not used afterwards, but for its configuration."""
    for module in forwards.checkpointing(model):
        module.gradient_checkpointing = False
    with eager(model):
        yield
