"""One micro-batch computed twice: as the training computes it, and with plain kernels and a plain loss."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import set_seed

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
_SMALL_ROUNDED = 2e-2
"""The same in the other types. Measured: in bfloat16 the bias of a choice between answers, whose gradient is zero but
for rounding, has 1.3e-3 of the largest norm on one path and another 1.3e-3 on the other."""
_REPEATED = 0.1
"""Share of the distance to a plain path that the training's own path, taken a second time, may be off itself."""
_ROUNDED = 0.25
"""Share of the distance to a plain path that the gradients may move with the rounding of each layer's result.

Measured in bfloat16 where kernels agree: 0.5 to 1.2 for one row whose ReLU or router flips; where a gradient is wrong:
0.01 to 0.1.
"""
_ROUNDINGS = 8
"""Times that the rounding is drawn, where kernels disagree: a ReLU near zero flips in one of two draws."""
_WORTH_REPEATING = 5e-4
"""Distance to a plain path in float32 above which the training's own path is taken again; 1e-3 fails."""
_WORTH_REPEATING_ROUNDED = 5e-2
"""The same in the other types, where 8e-2 and more fail."""


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
            if not isinstance(inputs, Mapping):
                raise InapplicableError("the Trainer makes its micro-batches itself, in each training step")
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
    # the Trainer copies it, and activates the noise of its copy
    trainer.args.neftune_noise_alpha = trainer.neftune_noise_alpha = None
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
        self.items = _counted(labels) if counted and isinstance(labels, Tensor) else None
        self.generators = _Generators(trainer, model)

    def record(self) -> PathsRecord:
        """Compute the training's own path, and compare the plain ones with it."""
        attention, checkpointing = forwards.attention_of(self.plain), bool(forwards.checkpointing(self.plain))
        with eager(self.plain) as has_eager:
            switched = [attention] if has_eager and attention not in ("", "eager") else []
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
        if not any(g is not None and bool(g.count_nonzero()) for g in gradients.values()):
            raise InapplicableError("every gradient of the training's first micro-batch is zero")
        usual = self._usual_loss()
        comparable = usual is not None and math.isclose(usual.item(), loss, rel_tol=_LOSS_RTOL, abs_tol=1e-6)
        drawn = self.generators.state()
        paths = []
        with _plainly(self.plain):
            # without a difference of kernels it would be compared with itself
            if switched:
                paths.append(self._compared("plain kernels", *self._own(self.plain), gradients))
                if self.generators.state() != drawn:
                    raise InapplicableError("the training draws random numbers that plain kernels draw otherwise")
            if comparable and (plain_loss := self._cross_entropy()) is not None:
                paths.append(self._compared("plain loss", *self._backward(plain_loss), gradients))
        if not paths and not record.nonfinite:
            raise InapplicableError("the training has no other kernels than the plain ones, and a loss of its own")
        self._require_repeatable(loss, gradients, paths)
        return dataclasses.replace(record, asked=len(paths), paths=tuple(paths))

    def _compared(
        self, name: str, loss: float, plain: dict[str, Tensor | None], gradients: dict[str, Tensor | None]
    ) -> PathRecord:
        small = _SMALL if self.arithmetic == "float32" else _SMALL_ROUNDED
        return _compared(name, loss, plain, gradients, small)

    def _require_repeatable(self, loss: float, gradients: dict[str, Tensor | None], paths: list[PathRecord]) -> None:
        """Raise InapplicableError where the training's own path, taken again, leads elsewhere too.

        A loss that keeps a queue, an average or a generator of its own differs from pass to pass, whatever computes it.
        """
        gap = max((_gap(p, loss) for p in paths), default=0.0)
        worth = _WORTH_REPEATING if self.arithmetic == "float32" else _WORTH_REPEATING_ROUNDED
        if not gap > worth:
            return
        again = self._compared("again", *self._own(self.model), gradients)
        if _gap(again, loss) > _REPEATED * gap:
            raise InapplicableError("the training's own loss and gradients are others when they are computed again")
        for seed in range(_ROUNDINGS):
            with _rounded_otherwise(self.plain, seed):
                path = self._compared("rounded otherwise", *self._own(self.plain), gradients)
            if not _gap(path, loss) <= _ROUNDED * gap:
                raise InapplicableError(
                    f"the gradients of its first micro-batch follow the rounding of {self.arithmetic}: without any"
                    f" other kernel they move by {_gap(path, loss):.1g} of their norm"
                )

    def _own(self, model: Any) -> tuple[float, dict[str, Tensor | None]]:
        """Take the Trainer's own training step, with the loss scale lowered until no gradient overflows."""
        scaler = self._scaler
        while True:
            self._clear()
            self.generators.seed()
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

    def _usual_loss(self) -> Tensor | None:
        """Return the cross-entropy without a gradient; None where the model cannot be asked without its labels."""
        try:
            with torch.no_grad():
                return self._cross_entropy()
        # an encoder-decoder makes inputs of its labels, and a class of its own may need them for anything
        except Exception:
            return None

    def _cross_entropy(self) -> Tensor | None:
        """Return the mean cross-entropy of the next token, in float32; None without such labels or logits."""
        labels = self.batch.get("labels")
        if not (isinstance(labels, Tensor) and labels.ndim == 2 and not labels.is_floating_point()):
            return None
        accepted = forwards.accepts(self.plain) - {"labels"}
        inputs = self.trainer._prepare_inputs({k: v for k, v in self.batch.items() if k in accepted})
        self.plain.train()
        self.generators.seed()
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


class _Generators:
    """Sources of random numbers: those of Python, NumPy and torch, and those that the model or its Trainer holds."""

    def __init__(self, trainer: Any, model: nn.Module) -> None:
        holders = [trainer, trainer.data_collator, *model.modules()]
        held = [v for h in holders for v in getattr(h, "__dict__", {}).values() if isinstance(v, torch.Generator)]
        self._own = [(g, g.get_state()) for g in held]
        self._device = next(model.parameters()).device

    def seed(self) -> None:
        """Let the pass that comes next draw the same numbers as any other."""
        set_seed(0)
        for generator, state in self._own:
            generator.set_state(state)

    def state(self) -> str:
        """A digest of how far the sources have been used."""
        states = [torch.get_rng_state(), *(g.get_state() for g, _ in self._own)]
        if self._device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self._device))
        parts = [repr(random.getstate()).encode(), repr(np.random.get_state()).encode()]
        parts += [s.numpy().tobytes() for s in states]
        return hashlib.sha256(b"".join(parts)).hexdigest()


def _gap(path: PathRecord, loss: float) -> float:
    """Distance of a path's gradients and of its loss, whose limit is a tenth; 0 where a loss is not finite."""
    if not (math.isfinite(path.loss) and math.isfinite(loss)):
        return 0.0
    return max(path.max_change, 10 * abs(loss - path.loss) / max(abs(path.loss), 1e-3))


def _dense(gradient: Tensor) -> Tensor:
    return (gradient.to_dense() if gradient.is_sparse else gradient).detach().float()


def _nonfinite(gradients: dict[str, Tensor | None]) -> Names:
    return Names.of(n for n, g in gradients.items() if g is not None and not bool(g.isfinite().all()))


def _compared(
    name: str, loss: float, plain: dict[str, Tensor | None], gradients: dict[str, Tensor | None], small: float
) -> PathRecord:
    """Return the largest relative distance of a tensor's gradients on the two paths, where both are finite."""
    unusable = {*_nonfinite(plain).first, *_nonfinite(gradients).first}
    pairs = {
        n: (g, p)
        for n, g in gradients.items()
        if (p := plain.get(n)) is not None and g is not None and n not in unusable
    }
    floor = small * max((p.norm().item() for _, p in pairs.values()), default=0.0)
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
    """Use eager attention and no checkpointing."""
    checkpointed = forwards.checkpointing(model)
    for module in checkpointed:
        module.gradient_checkpointing = False
    try:
        with eager(model):
            yield
    finally:
        for module in checkpointed:
            module.gradient_checkpointing = True


@contextlib.contextmanager
def _rounded_otherwise(model: nn.Module, seed: int) -> Iterator[None]:
    """Move the result of every linear layer, at random, by up to one place of its type at its root mean square.

    So two kernels may differ that both are right: what a layer is given was rounded, and large terms may cancel. A
    layer that is computed again, by checkpointing, moves alike.
    """

    def hook(number: int) -> Callable[..., Any]:
        def moved(module: nn.Module, args: Any, output: Any) -> Any:
            if not isinstance(output, Tensor) or not output.is_floating_point():
                return output
            generator = torch.Generator(output.device).manual_seed(1000 * number + seed)
            drawn = 2 * torch.rand(output.shape, generator=generator, device=output.device) - 1
            size = torch.finfo(output.dtype).eps * output.detach().float().square().mean().sqrt()
            return output + (size * drawn).to(output.dtype)

        return moved

    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    hooks = [m.register_forward_hook(hook(i)) for i, m in enumerate(layers)]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()


def _counted(labels: Tensor) -> Tensor:
    """The number of labels that count; one label for each row is no sequence, whose first one nothing predicts."""
    return torch.as_tensor(((labels[..., 1:] if labels.ndim > 1 else labels) != IGNORED).sum())
