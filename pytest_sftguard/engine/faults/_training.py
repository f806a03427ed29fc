"""What faults do to a training while it runs: to its losses, gradients and optimizer, at a step or at all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from pytest_sftguard.engine.surroundings.isolation import isolated

if TYPE_CHECKING:
    from transformers import Trainer


class At(TrainerCallback):  # type: ignore[misc] # transformers types its callbacks as Any
    """Calls `act` at one of the Trainer's events: when `step`, from 1, is under way, or always."""

    def __init__(self, event: str, act: Callable[[], Any], step: int | None = None) -> None:
        def handler(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            done = state.global_step - (event == "on_step_end")
            if step is None or done == step - 1:
                act()

        setattr(self, event, handler)


def trainables(trainer: Trainer) -> dict[str, nn.Parameter]:
    """Every trainable parameter by its name."""
    return {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}


def factor(trainer: Trainer, kind: str) -> nn.Parameter:
    """The first trainable tensor with `kind`, such as `lora_B`, in its name; the first of all where there is none."""
    tensors = trainables(trainer)
    return next((p for n, p in tensors.items() if kind in n), next(iter(tensors.values())))


def cast(trainer: Trainer, dtype: torch.dtype) -> Trainer:
    """Give the trainable tensors the type that `autocast_adapter_dtype=False` leaves them in."""
    for parameter in trainables(trainer).values():
        parameter.data = parameter.data.to(dtype)
    return trainer


def multiply_loss(trainer: Trainer, factor: float, step: int) -> Trainer:
    """Multiply the loss of each micro-batch of `step` in training."""
    original = trainer.compute_loss

    def compute_loss(model: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(model, *args, **kwargs)
        if not (model.training and trainer.state.global_step == step - 1):
            return result
        if isinstance(result, tuple):
            return (result[0] * factor, *result[1:])
        return result * factor

    trainer.compute_loss = compute_loss
    return trainer


def spoil_gradient(trainer: Trainer, parameter: nn.Parameter, value: float, step: int) -> Trainer:
    """Put `value` into one entry of the gradient of `parameter` at `step`."""

    def spoilt(gradient: Tensor) -> Tensor:
        if trainer.state.global_step != step - 1:
            return gradient
        gradient = gradient.clone()
        gradient.view(-1)[0] = value
        return gradient

    parameter.register_hook(spoilt)  # type: ignore[no-untyped-call] # torch types it not
    return trainer


def start_scale(trainer: Trainer, scale: Callable[[], float]) -> Trainer:
    """Have the loss scaler begin at `scale()`, which is asked for when the training begins."""

    def begin() -> None:
        scaler = trainer.accelerator.scaler
        if scaler is not None:
            scaler.load_state_dict(scaler.state_dict() | {"scale": scale()})

    trainer.add_callback(At("on_train_begin", begin))
    return trainer


def largest_scale(trainer: Trainer) -> float:
    """The largest power of two under which the first batch's gradients do not overflow in float16, found by trying."""
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
