"""The same step once more, on tensors alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pytest_sftguard.engine.recording.stepping import Stepping, elements, repeatable
from pytest_sftguard.engine.tensors.layouts import Layout

MADE: dict[str, Any] = {
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "adamax": lambda p: torch.optim.Adamax(p, lr=1e-2),
    "radam": lambda p: torch.optim.RAdam(p, lr=1e-2),
}


def tensors(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """Parameters of several shapes, one of them longer than what is compared."""
    drawn = torch.Generator().manual_seed(0)
    shapes = [(3, 5), (8,), (2, elements(4)), (3, 5)]
    return [nn.Parameter(torch.randn(s, generator=drawn).to(dtype)) for s in shapes]


def stepped(optimizer: torch.optim.Optimizer, held: list[nn.Parameter], step: int, change: Any = None) -> Any:
    """Give random gradients, take a step, do `change`, and return the departure."""
    drawn = torch.Generator().manual_seed(step)
    for p in held:
        p.grad = torch.randn(p.shape, generator=drawn).to(p.dtype)
    assert repeatable(optimizer, held, step)
    once_more = Stepping(optimizer, Layout(held), held, [p.grad for p in held if p.grad is not None], None, step)
    optimizer.step()
    if change is not None:
        with torch.no_grad():
            change(held)
    return once_more.departure()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MADE)
def test_an_optimizer_repeats_itself(name: str, dtype: torch.dtype) -> None:
    """In its first steps, with states and without."""
    held = tensors(dtype)
    optimizer = MADE[name](held)
    assert [stepped(optimizer, held, step).share for step in (1, 2, 3)] == [0, 0, 0]


@pytest.mark.parametrize("name", MADE)
def test_a_change_beside_it_is_seen(name: str) -> None:
    """One tensor whose update is a tenth larger is named, in the first step and in a later one."""
    held = tensors()
    optimizer = MADE[name](held)
    for step in (1, 2):
        before = held[1].detach().clone()
        found = stepped(optimizer, held, step, lambda p, b=before: p[1].add_(0.1 * (p[1] - b)))
        assert found.place == 1
        assert found.share == pytest.approx(0.1, rel=0.2)


def test_a_scale_is_divided_out() -> None:
    """Gradients that are still multiplied by a loss scale are compared without it."""
    held = tensors()
    optimizer = torch.optim.AdamW(held, lr=1e-2)
    for p in held:
        p.grad = torch.randn_like(p) * 1024
    once_more = Stepping(optimizer, Layout(held), held, [p.grad for p in held], torch.tensor(1024.0), 1)
    for p in held:
        p.grad /= 1024
    optimizer.step()
    assert once_more.departure().share == 0


def test_what_cannot_be_repeated_is_not() -> None:
    """A subclass, another step, another type or a missing gradient."""
    held = tensors()
    for p in held:
        p.grad = torch.zeros_like(p)
    own = type("Own", (torch.optim.AdamW,), {})(held)
    assert not repeatable(own, held, 1)
    assert not repeatable(torch.optim.AdamW(held), held, 5)
    assert not repeatable(torch.optim.AdamW(held[1:]), held, 1)
    assert not repeatable(torch.optim.AdamW(held), [*held, nn.Parameter(torch.zeros(2))], 1)


def test_no_random_number_is_taken_from_the_training() -> None:
    """The generator is where it was."""
    held = tensors()
    optimizer = MADE["adamw"](held)
    before = torch.get_rng_state()
    stepped(optimizer, held, 1)
    assert torch.equal(before, torch.get_rng_state())
