"""Loops as users write them, around the tiny model, for the tests of what observes them."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from pytest_sftguard.engine.models import tiny
from pytest_sftguard.engine.recording.observer import Observer, observe_accelerate

Spoil = Callable[[nn.Module, int], Any]
"""What goes wrong, told the model and the number of the step, when its gradients are there."""


def model(dtype: str = "float32", adapters: str = "float32") -> nn.Module:
    """The tiny model with its LoRA, untrained, in training mode."""
    with tempfile.TemporaryDirectory() as folder:
        made: nn.Module = tiny.build_trainer(dtype=dtype, output_dir=folder, use_cpu=True, report_to="none").model
    for parameter in trainable(made):
        parameter.data = parameter.data.to(getattr(torch, adapters))
    return made.train()


def trainable(of: nn.Module) -> list[nn.Parameter]:
    """What takes a gradient."""
    return [p for p in of.parameters() if p.requires_grad]


def batches(size: int = 4) -> DataLoader[Any]:
    """The tiny rows, collated."""
    rows: Any = tiny.rows(64)
    return DataLoader(rows, batch_size=size, collate_fn=tiny.collate)


def adam(of: nn.Module, **arguments: Any) -> torch.optim.Optimizer:
    """A plain AdamW."""
    return torch.optim.AdamW(trainable(of), **{"lr": 1e-2, **arguments})


def bare(
    of: nn.Module,
    *,
    steps: int = 6,
    accumulation: int = 1,
    spoil: Spoil | None = None,
    scaler: torch.amp.GradScaler | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    unscaled_first: bool = False,
    clear: bool = True,
    **observed: Any,
) -> Observer:
    """A bare torch loop; with a scaler, one in float16 mixed precision."""
    chosen = optimizer or adam(of)
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    feed = iter(batches())
    with Observer(of, chosen, scaler=scaler, **observed) as observer:
        for step in range(1, steps + 1):
            for _ in range(accumulation):
                with torch.autocast("cpu", torch.float16, enabled=scaler.is_enabled()):
                    loss = of(**next(feed)).loss
                observer.micro_batch(loss)
                scaler.scale(loss / accumulation).backward()  # type: ignore[no-untyped-call]
            if spoil is not None:
                spoil(of, step)
            if unscaled_first:
                scaler.unscale_(chosen)
            observer.before_step()
            if not unscaled_first:
                scaler.unscale_(chosen)
            nn.utils.clip_grad_norm_(trainable(of), 1.0)
            scaler.step(chosen)
            scaler.update()
            observer.after_step()
            if clear:
                chosen.zero_grad()
    return observer


def plain_accelerate(
    of: nn.Module,
    *,
    steps: int = 6,
    accumulation: int = 1,
    spoil: Spoil | None = None,
    observe: Callable[..., Observer] | None = None,
    **observed: Any,
) -> Observer:
    """A plain accelerate loop, with one line that is ours; `observe` is the fixture in a test that has it."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    prepared, optimizer, data = accelerator.prepare(of, adam(of), batches())
    if observe is None:
        made = observe_accelerate(accelerator, prepared, optimizer, **observed)
    else:
        made = observe(prepared, optimizer, accelerator=accelerator, **observed)
    with made as observer, _spoilt(of, spoil):
        for i, batch in enumerate(data):
            if i == steps * accumulation:
                break
            with accelerator.accumulate(prepared):
                accelerator.backward(prepared(**batch).loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(trainable(of), 1.0)
                optimizer.step()
                optimizer.zero_grad()
    return observer


@contextlib.contextmanager
def _spoilt(of: nn.Module, spoil: Spoil | None) -> Iterator[None]:
    """Call `spoil` from within the backward pass, in the loss's own gradient."""
    calls = [0]

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        calls[0] += 1
        if spoil is not None:
            output.loss.register_hook(lambda gradient: spoil(of, calls[0]))

    handle = of.register_forward_hook(hook)
    yield
    handle.remove()
