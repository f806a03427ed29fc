"""Every optimizer step a second time, on float32 copies, with the gradients that the real optimizer is given."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from pytest_sftguard.engine.looks import InapplicableError, Look
from pytest_sftguard.engine.recording.recorder import Recorder
from pytest_sftguard.engine.recording.stepping import made, options
from pytest_sftguard.engine.stages import Started
from pytest_sftguard.engine.surroundings.errors import first_line
from pytest_sftguard.engine.surroundings.isolation import isolated
from pytest_sftguard.engine.tensors.reductions import norms, to_host
from pytest_sftguard.records import ReplayedStepRecord, ReplayedTensorRecord, ReplayRecord


class Replay(Look[Started]):
    """Replays each optimizer step in float32, and compares how far the tensors moved.

    It hooks onto `torch.optim.Optimizer.step`. There the gradients are those that the step uses, after clipping and
    after every callback. The real tensors and their optimizer are read, never written.

    What anything else writes into a tensor between two steps, such as AdaLoRA when it takes ranks away, is written into
    its copy, too: a step may depend on the weights, by their decay.
    """

    def attach(self, started: Started) -> None:
        """Wait for the optimizer, which is made when the training begins."""
        self._begin = _Begin(started.recorder)
        started.trainer.add_callback(self._begin)

    def conclude(self, reached: Started) -> dict[str, Any]:
        """Return the norms of all updates, real and replayed."""
        reached.trainer.remove_callback(self._begin)
        shadow = self._begin.shadow
        if shadow is None:
            raise InapplicableError(self._begin.reason or "no optimizer was made")
        shadow.detach()
        if shadow.reason:
            raise InapplicableError(shadow.reason)
        if not shadow.steps and any(s.changed for s in reached.recorder.steps):
            raise InapplicableError("the optimizer's step does not call torch's hooks, so that it cannot be replayed")
        return {"replay": shadow.record()}


# transformers types its callbacks as Any
class _Begin(TrainerCallback):  # type: ignore[misc]
    """Makes a shadow of the optimizer when the training begins."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.shadow: _Shadow | None = None
        self.reason = ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make a shadow; a training that begins again, after out-of-memory, gets a new one."""
        prepared = kwargs.get("optimizer")
        optimizer = getattr(prepared, "optimizer", prepared)
        if self.shadow is not None:
            if self.shadow.optimizer is optimizer:
                return
            self.shadow.detach()
            self.shadow = None
        try:
            # an optimizer may draw random numbers when it is made
            with isolated():
                self.shadow = _Shadow(optimizer, self.recorder)
        # somebody else's class may require any argument
        except Exception as error:
            first = first_line(error)
            self.reason = f"{type(optimizer).__name__} cannot be made a second time: {type(error).__name__}: {first}"


class _Shadow:
    """A second optimizer on float32 copies of the trainable tensors."""

    def __init__(self, optimizer: Any, recorder: Recorder) -> None:
        self.optimizer, self.recorder = optimizer, recorder
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError("it is not a torch.optim.Optimizer")
        self.reason = ""
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self._real = {n: p for n, p in recorder.parameters.items() if id(p) in owned}
        if not self._real:
            raise ValueError("it holds no trainable tensor")
        self._copies = {n: _float32(p).requires_grad_() for n, p in self._real.items()}
        self._moved = [torch.zeros_like(c) for c in self._copies.values()]
        self._replayed = [torch.zeros_like(c) for c in self._copies.values()]
        self._twin = self._made()
        self._depth = 0
        self._before: list[Tensor] | None = None
        self._left: list[Tensor] | None = None
        self.steps: list[tuple[int, list[float], list[float]]] = []
        self._hooks = [
            optimizer.register_step_pre_hook(self._on_step),
            optimizer.register_step_post_hook(self._on_stepped),
        ]

    def detach(self) -> None:
        """Take the hooks off the optimizer."""
        for hook in self._hooks:
            hook.remove()

    def record(self) -> ReplayRecord:
        """Return what was seen."""
        names = list(self._real)
        steps = []
        for step, moved, replayed in self.steps:
            i = max(range(len(names)), key=lambda i: _distance(moved[i], replayed[i]))
            steps.append(ReplayedStepRecord(step=step, tensor=names[i], update_norm=moved[i], replay_norm=replayed[i]))
        moved, replayed = to_host([norms(self._moved, 2), norms(self._replayed, 2)])
        return ReplayRecord(
            optimizer=type(self.optimizer).__name__,
            steps=tuple(steps),
            tensors=tuple(
                ReplayedTensorRecord(name=n, update_norm=m, replay_norm=r)
                for n, m, r in zip(names, moved, replayed, strict=True)
            ),
        )

    def _made(self) -> torch.optim.Optimizer:
        """Return a second optimizer of the same class, with the same groups and states, in float32."""
        names = {id(p): n for n, p in self._real.items()}
        groups = []
        for group in self.optimizer.param_groups:
            copies = [self._copies[names[id(p)]] for p in group["params"] if id(p) in names]
            groups.append({**options(group), "params": copies})
        twin = made(self.optimizer, groups)
        for name, p in self._real.items():
            if p in self.optimizer.state:
                twin.state[self._copies[name]] = {k: _state(v) for k, v in self.optimizer.state[p].items()}
        return twin

    def _on_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Take the step in float32: the real one comes next."""
        # a subclass that calls its parent's step comes here twice
        self._depth += 1
        if self._depth > 1 or self.reason:
            return
        if any(callable(a) for a in (*args, *kwargs.values())):
            self.reason = f"{type(optimizer).__name__} calls the model itself, through a closure"
            return
        if _skips(optimizer):
            return
        try:
            with isolated(), torch.enable_grad():
                self._replay(optimizer)
        # the real step may accept what the copy does not
        except Exception as error:
            first = first_line(error)
            self.reason = f"{type(optimizer).__name__} cannot step on float32 copies: {type(error).__name__}: {first}"

    def _replay(self, optimizer: Any) -> None:
        # a fused optimizer unscales the gradients itself
        scale = getattr(optimizer, "grad_scale", None)
        for name, p in self._real.items():
            grad = None if p.grad is None else _float32(p.grad)
            self._copies[name].grad = grad if grad is None or scale is None else grad / scale
        for mine, group in zip(self._twin.param_groups, optimizer.param_groups, strict=True):
            mine.update(options(group))
        now, copies = [_float32(p) for p in self._real.values()], [c.detach() for c in self._copies.values()]
        for copied, present, left in zip(copies, now, self._left or now, strict=True):
            # NaN is not equal to itself
            copied.copy_(torch.where((present == left) | left.isnan(), copied, present))
        before = [c.clone() for c in copies]
        self._twin.step()
        torch._foreach_add_(self._replayed, torch._foreach_sub(copies, before))
        self._before = now

    def _on_stepped(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Note how far the real step went."""
        self._depth -= 1
        if self._depth or self._before is None:
            return
        now = [_float32(p) for p in self._real.values()]
        torch._foreach_add_(self._moved, torch._foreach_sub(now, self._before))
        self._before, self._left = None, now
        moved, replayed = to_host([norms(self._moved, 2), norms(self._replayed, 2)])
        self.steps.append((self.recorder.taken + 1, moved, replayed))


def _float32(tensor: Tensor) -> Tensor:
    dense = tensor.detach().to_dense() if tensor.is_sparse else tensor.detach()
    return dense.to(torch.float32, copy=True)


def _state(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _float32(value) if value.is_floating_point() and value.numel() > 1 else value.detach().clone()
    return copy.deepcopy(value)


def _skips(optimizer: Any) -> bool:
    """Return whether the loss scaler found an overflow: a fused kernel is called all the same, and does nothing."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found.sum().item() > 0)


def _distance(moved: float, replayed: float) -> float:
    """Return the ratio of two norms, at least 1; infinite where one is zero or not finite."""
    if moved == replayed:
        return 1.0
    low, high = min(moved, replayed), max(moved, replayed)
    return high / low if low > 0 and high < float("inf") else float("inf")
