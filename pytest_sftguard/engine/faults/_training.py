"""Training: changes to a finished Trainer, to its losses, gradients, parameters and methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from pytest_sftguard.engine.surroundings.isolation import isolated


def wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Have each call of the method `name` of `owner` call `around(method, *args, **kwargs)` instead."""
    method = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: around(method, *args, **kwargs))


def at(trainer: Trainer, event: str, act: Callable[[], object], step: int | None = None) -> None:
    """Call `act` at `event`, a method of TrainerCallback, in each step or in `step` alone, from 1."""

    def handle(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if step is None or state.global_step == step - 1:
            act()

    callback = TrainerCallback()
    setattr(callback, event, handle)
    trainer.add_callback(callback)


def trainables(trainer: Trainer) -> dict[str, nn.Parameter]:
    """Every trainable parameter by its name."""
    return {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}


def factor(trainer: Trainer, part: str) -> nn.Parameter:
    """The first trainable tensor with `part`, such as `lora_B`, in its name; the first of all if there is none."""
    tensors = trainables(trainer)
    return next((p for n, p in tensors.items() if part in n), next(iter(tensors.values())))


def cast(trainer: Trainer, dtype: torch.dtype, part: str = "") -> None:
    """Cast the trainable tensors with `part` in their names, as `autocast_adapter_dtype=False` leaves them."""
    for name, parameter in trainables(trainer).items():
        if part in name:
            parameter.data = parameter.data.to(dtype)


def multiply_loss(trainer: Trainer, by: Callable[[], float], step: int | None = None) -> None:
    """Multiply each loss by `by()`, or those of the training step `step` alone."""

    def multiplied(compute_loss: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        result = compute_loss(model, *args, **kwargs)
        if step is not None and not (model.training and trainer.state.global_step == step - 1):
            return result
        return (result[0] * by(), *result[1:]) if isinstance(result, tuple) else result * by()

    wrap(trainer, "compute_loss", multiplied)


def spoil_gradient(trainer: Trainer, parameter: nn.Parameter, step: int) -> None:
    """Write inf into one entry of the gradient of `parameter` in `step`."""

    def spoilt(gradient: Tensor) -> Tensor:
        if trainer.state.global_step != step - 1:
            return gradient
        gradient = gradient.clone()
        gradient.view(-1)[0] = torch.inf
        return gradient

    # torch does not annotate it
    parameter.register_hook(spoilt)  # type: ignore[no-untyped-call]


def set_scale(trainer: Trainer, scale: float) -> None:
    """Set the loss scale, if the Trainer has a loss scaler."""
    scaler = trainer.accelerator.scaler
    if scaler is not None:
        scaler.load_state_dict(scaler.state_dict() | {"scale": scale})


def largest_scale(trainer: Trainer) -> float:
    """The largest power of two up to 2**30 with which the first batch's gradients are finite in float16, by trial."""
    model, parameters = trainer.model, list(trainables(trainer).values())
    training, scale = model.training, 2.0**30
    model.train()
    with isolated():
        batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        while scale > 1:
            with torch.autocast(trainer.args.device.type, torch.float16):
                loss = trainer.compute_loss(model, dict(batch))
            (loss * scale).backward()
            fits = all(p.grad is None or bool(p.grad.isfinite().all()) for p in parameters)
            for p in parameters:
                p.grad = None
            if fits:
                break
            scale /= 2
    model.train(training)
    return scale
