"""What a Recorder costs: it never waits for the device but once a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pytest_sftguard.engine.recording import Recorder


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
    """Losses, scales, gradients, updates and moments go to the host in one transfer, none of them by itself."""
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
    """The norm is that of the unscaled gradient; the scale is kept beside it, as it was."""
    model, scale = nn.Linear(2, 1, bias=False), torch.tensor(8.0)
    recorder = Recorder(model)
    (model(torch.tensor([[3.0, 4.0]])).sum() * scale).backward()
    recorder.before_step(scale)
    scale.mul_(0.5)
    recorder.after_step(torch.optim.SGD(model.parameters(), lr=0.0), 0.0, scale)
    [step] = recorder.finished()
    assert (step.grad_norm, step.loss_scale, step.loss_scale_after) == (5.0, 8.0, 4.0)
    assert step.effect == "skipped_by_scaler"
