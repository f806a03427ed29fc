"""A Recorder waits for the device once per step, and its records do not depend on when they are made."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pytest_sftguard.engine.recording.recorder import Recorder
from pytest_sftguard.engine.recording.stepping import elements
from pytest_sftguard.records import StepRecord


class Waits(TorchDispatchMode):
    """Counts the operations that make the host wait for a device: reading one number, and copying to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def test_a_step_reads_no_single_number() -> None:
    """All numbers of a step go to the host in one transfer, none of them separately."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    recorder, scale = Recorder(model), torch.tensor(1024.0)
    for _ in range(2):
        recorder.begin_micro_batch()
        loss = model(torch.ones(3, 4)).square().mean()
        (loss * scale).backward()
        with Waits() as waits:
            recorder.collated({"labels": torch.ones(3, 5)})
            recorder.micro_batch(loss)
            recorder.micro_batch_done(loss)
            recorder.before_step(scale)
        optimizer.step()
        with waits:
            recorder.after_step(optimizer, 1e-3, scale)
        assert waits.seen == []


def test_gradients_are_recorded_without_their_scale() -> None:
    """The norm is that of the unscaled gradient, and the record has the scale as well."""
    model, scale = nn.Linear(2, 1, bias=False), torch.tensor(8.0)
    recorder = Recorder(model)
    (model(torch.tensor([[3.0, 4.0]])).sum() * scale).backward()
    recorder.before_step(scale)
    scale.mul_(0.5)
    recorder.after_step(torch.optim.SGD(model.parameters(), lr=0.0), 0.0, scale)
    [step] = recorder.finished()
    assert (step.grad_norm, step.loss_scale, step.loss_scale_after) == (5.0, 8.0, 4.0)
    assert step.effect == "skipped_by_scaler"


def trained(*, asked: bool) -> tuple[Recorder, list[int]]:
    """Seventy steps with two falling learning rates, an infinite moment in one step and NaN in the last."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    groups = [{"params": model[0].parameters(), "lr": 1e-2}, {"params": model[1].parameters(), "weight_decay": 0.1}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    recorder, seen = Recorder(model), []
    for step in range(1, 71):
        recorder.begin_micro_batch()
        loss = model(torch.randn(3, 4)).square().mean() * (math.nan if step == 70 else 1.0)
        optimizer.zero_grad()
        loss.backward()
        recorder.micro_batch(loss)
        recorder.micro_batch_done(loss)
        recorder.before_step()
        recorder.at_optimizer()
        optimizer.step()
        if step == 60:
            optimizer.state[model[0].weight]["exp_avg_sq"][0, 0] = math.inf
        recorder.after_step(optimizer, optimizer.param_groups[0]["lr"])
        if step == 60:
            optimizer.state[model[0].weight]["exp_avg_sq"][0, 0] = 1.0
        for group in optimizer.param_groups:
            group["lr"] *= 0.9
        seen.append(len(recorder.steps) if asked else recorder.taken)
    return recorder, seen


def test_a_skipped_step_is_not_repeated() -> None:
    """Also if the overflow lies in an element that is not compared."""
    model, scale = nn.Linear(2 * elements(1), 1, bias=False), torch.tensor(8.0)
    optimizer, recorder = torch.optim.SGD(model.parameters(), lr=0.1), Recorder(model)
    model(torch.ones(2 * elements(1))).sum().backward()
    gradient = model.weight.grad
    assert gradient is not None
    drawn = torch.randint(2 * elements(1), (elements(1),), generator=torch.Generator().manual_seed(1))
    gradient[0, min(set(range(2 * elements(1))) - {*drawn.tolist()})] = math.inf
    recorder.before_step(scale)
    recorder.at_optimizer(scale, optimizer)
    scale.mul_(0.5)
    recorder.after_step(optimizer, 0.1, scale)
    [step] = recorder.finished()
    assert (step.effect, step.departure) == ("skipped_by_scaler", None)


def after_a_step_at_rate_0(
    first: tuple[float, float] = (10.0, 1.0), second: tuple[float, float] = (-1.0, 1.0), **options: Any
) -> tuple[StepRecord, ...]:
    """Two steps of SGD, of which the first moves nothing and has a large gradient to another side."""
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, **options)
    recorder = Recorder(model)
    for rate, gradient in ((0.0, first), (0.1, second)):
        optimizer.param_groups[0]["lr"] = rate
        model.weight.grad = torch.tensor([gradient])
        recorder.before_step()
        optimizer.step()
        recorder.after_step(optimizer, rate)
    return recorder.finished()


@pytest.mark.parametrize("maximize", [False, True])
def test_an_update_is_held_to_the_gradients_in_its_momentum(maximize: bool) -> None:
    """A large gradient of a step at the rate 0 decides the direction of the next one."""
    first, second = after_a_step_at_rate_0(momentum=0.9, maximize=maximize)
    assert first.update_cosine is None
    assert second.update_cosine is not None
    assert (second.update_cosine > 0.9) is maximize
    assert (second.update_cosine < -0.9) is not maximize


@pytest.mark.parametrize("options", [{"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}])
def test_gradients_that_cancel_fade_in_the_momentum(options: dict[str, Any]) -> None:
    """Of two that are nearly opposite, what is left has the sign of the later one."""
    _, step = after_a_step_at_rate_0((1.0, 0.0), (-0.95, 0.01), **options)
    assert step.update_cosine is not None
    assert step.update_cosine < -0.9


@pytest.mark.parametrize("maximize", [False, True])
def test_without_momentum_an_update_is_held_to_its_own_gradient(maximize: bool) -> None:
    """A large gradient of a step at the rate 0 is in no later update."""
    _, second = after_a_step_at_rate_0(maximize=maximize)
    assert second.update_cosine == pytest.approx(1.0 if maximize else -1.0)


def test_a_step_whose_gradients_were_not_seen_is_passed_over() -> None:
    """It comes between a step at the rate 0 and the first that moves anything."""
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    recorder = Recorder(model)
    model.weight.grad = torch.ones(1, 2)
    recorder.before_step()
    recorder.after_step(optimizer, 0.0)
    recorder.after_step(optimizer, 0.0)
    assert [s.update_cosine for s in recorder.finished()] == [None, None]


def test_records_are_the_same_whenever_they_are_made() -> None:
    """Records that are made step by step equal those that are made together after the training."""
    (one_by_one, counted), (together, taken) = trained(asked=True), trained(asked=False)
    assert counted == taken == list(range(1, 71))
    alone, later = ([dataclasses.replace(s, seconds=None) for s in r.finished()] for r in (one_by_one, together))
    assert repr(alone) == repr(later)
    assert later[59].nonfinite_moments.first == ("0.weight:exp_avg_sq",)
    assert [s.step for s in later if s.nonfinite_weights] == [70]
    assert all(0.5 < (s.max_update_ratio or 0) < 10 for s in later[:5])
