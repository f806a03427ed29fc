"""Whether an optimizer's step is that of its class: the same step once more, for some elements of each tensor.

Most optimizers treat each element by itself. So a second optimizer of the same class, with the same options and states,
makes of some elements of a tensor what the first one makes of them, but for a few roundings.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pytest_sftguard.engine.recording.sampling import sampled
from pytest_sftguard.engine.tensors.layouts import Layout

_EACH, _ALL = 256, 1 << 15
"""Elements that are compared in each step, others in each: of one tensor at least, and of all as far as that goes."""

_BY_ELEMENT = (
    torch.optim.Adadelta,
    torch.optim.Adagrad,
    torch.optim.Adam,
    torch.optim.Adamax,
    torch.optim.AdamW,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.SGD,
)
"""Classes of torch whose step treats each element by itself; a subclass may do anything."""
_ROUNDINGS = 8
"""Roundings of a weight that two kernels may differ by."""


@dataclass(frozen=True)
class Departure:
    """The tensor whose update is furthest from that of the optimizer's class."""

    place: int
    """Its index among the parameters."""
    share: float
    """Largest difference of an element beyond a few roundings, relative to the largest due update of the tensor."""


def repeatable(optimizer: Any, tensors: Sequence[Tensor], step: int) -> bool:
    """Whether `step`, from 1, is one of those that are repeated, and can be repeated element by element.

    All `tensors` must be of one type, belong to `optimizer` and have gradients of that type.
    """
    if not sampled(step) or type(optimizer) not in _BY_ELEMENT or not tensors:
        return False
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    dtype = tensors[0].dtype
    return dtype is not torch.float64 and all(
        id(t) in held and t.dtype is dtype and t.grad is not None and t.grad.dtype is dtype for t in tensors
    )


class Stepping:
    """A step of `optimizer` that is about to be taken, for some elements of `tensors`, arranged in `layout`.

    Their gradients are still multiplied by `scale`, if there is one. Nothing waits for the device before `departure`.
    """

    @torch.no_grad()
    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        layout: Layout,
        tensors: Sequence[Tensor],
        gradients: Sequence[Tensor],
        scale: Tensor | None,
        step: int,
    ) -> None:
        self._optimizer, self._layout, self._tensors = optimizer, layout, tensors
        self._most = elements(len(tensors))
        # a generator of its own leaves the training's as it is
        self._draw, self._columns = torch.Generator().manual_seed(step), dict[int, Tensor]()
        self._options = [options(group) for group in optimizer.param_groups]
        states = [optimizer.state.get(t, {}) for t in tensors]
        self._names = [k for k, v in states[0].items() if isinstance(v, Tensor) and v.shape == tensors[0].shape]
        self._fits = all(_holds(s, self._names, t) for s, t in zip(states, tensors, strict=True))
        given = [tensors, gradients, *([s[n] for s in states] for n in self._names)] if self._fits else []
        self._given = [self._some(each) for each in given]
        self._scale = None if scale is None else scale.detach().clone().reshape(1)

    @torch.no_grad()
    def departure(self) -> Departure | None:
        """Compare the step, now taken, with the same one of a second optimizer.

        None if it cannot be repeated, or a number is not finite, as where a loss scaler skipped it.
        """
        if not self._given:
            return None
        parts = [*self._given, self._some(self._tensors)]
        every = torch.stack([p.float() for p in parts]).cpu()
        if not bool(every.isfinite().all()):
            return None
        before, gradient, *states, after = every
        gradient = gradient if self._scale is None else gradient / self._scale.cpu()
        due = self._repeated(before, gradient, states)
        rows, count = self._rows(), len(self._tensors)
        update, apart, size = (
            torch.zeros(count).scatter_reduce(0, rows, t.abs(), "amax")
            for t in (due - before, due - after, torch.maximum(before.abs(), after.abs()))
        )
        beyond = (apart - _ROUNDINGS * torch.finfo(self._tensors[0].dtype).eps * size).clamp(min=0)
        shares = torch.where(beyond > 0, beyond / update, 0.0)
        worst = int(shares.argmax())
        return Departure(self._layout.order[worst], float(shares[worst]))

    def _repeated(self, before: Tensor, gradient: Tensor, states: Sequence[Tensor]) -> Tensor:
        """The elements after a step of a second optimizer, shape (elements,)."""
        dtype, due, rows = self._tensors[0].dtype, before.clone(), self._rows()
        alike: dict[tuple[int, float | None], list[int]] = {}
        for row, key in enumerate(self._keys()):
            alike.setdefault(key, []).append(row)
        for (group, taken), members in alike.items():
            chosen = torch.isin(rows, torch.tensor(members))
            weight = before[chosen].to(dtype)
            weight.grad = gradient[chosen].to(dtype)
            twin = made(self._optimizer, [{**self._options[group], "params": [weight]}])
            if self._names:
                twin.state[weight] = {n: s[chosen].to(dtype) for n, s in zip(self._names, states, strict=True)}
                twin.state[weight] |= {} if taken is None else {"step": torch.tensor(taken)}
            twin.step()
            due[chosen] = weight.float()
        return due

    def _keys(self) -> list[tuple[int, float | None]]:
        """The group of each row, and the number of steps before this one, where the optimizer counts them."""
        groups = {id(p): i for i, group in enumerate(self._optimizer.param_groups) for p in group["params"]}
        ordered = [self._tensors[i] for i in self._layout.order]
        counts = [self._optimizer.state.get(t, {}).get("step") for t in ordered]
        if any(c is None for c in counts):
            return [(groups[id(t)], None) for t in ordered]
        # where a fused kernel counts on the device, one transfer for all
        taken = torch.stack([torch.as_tensor(c, dtype=torch.float32) for c in counts]).tolist()
        return [(groups[id(t)], n - 1) for t, n in zip(ordered, taken, strict=True)]

    def _rows(self) -> Tensor:
        """Index in the layout's order of each element's tensor, shape (elements,)."""
        widths = torch.tensor([min(self._tensors[i].numel(), self._most) for i in self._layout.order])
        return torch.repeat_interleave(torch.arange(len(widths)), widths)

    def _some(self, tensors: Sequence[Tensor]) -> Tensor:
        """Elements of `tensors`, in the layout's order, shape (elements,)."""
        return torch.cat([rows[:, self._chosen(rows)].flatten() for rows in self._layout.blocks(tensors)])

    def _chosen(self, rows: Tensor) -> Tensor:
        length = rows.shape[1]
        if length not in self._columns:
            self._columns[length] = self._drawn(length).to(rows.device)
        return self._columns[length]

    def _drawn(self, length: int) -> Tensor:
        if length <= self._most:
            return torch.arange(length)
        # of a long tensor the same element is hardly ever drawn twice
        return torch.randint(length, (self._most,), generator=self._draw)


def elements(tensors: int) -> int:
    """Number of elements that are compared of each of so many tensors, or all that it has."""
    return max(_EACH, _ALL // max(1, tensors))


def made(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """A second optimizer of the same class, for other `groups`. A class may raise anything when it is made."""
    class_: type[torch.optim.Optimizer] = type(optimizer)
    taken = inspect.signature(class_.__init__).parameters
    defaults = {k: copy.deepcopy(v) for k, v in optimizer.defaults.items() if k in taken}
    return class_(groups, **(defaults | {k: None for k in ("fused", "foreach") if k in taken}))


def options(group: dict[str, Any]) -> dict[str, Any]:
    """The options of a group of parameters, without the choice of a kernel."""
    own = {k: copy.deepcopy(v) for k, v in group.items() if k not in ("params", "param_names")}
    return own | {k: None for k in ("fused", "foreach") if k in own}


def _holds(state: dict[str, Any], names: Sequence[str], tensor: Tensor) -> bool:
    """Whether a state has those tensors, in the type of its parameter, and no others."""
    whole = [k for k, v in state.items() if isinstance(v, Tensor) and v.shape == tensor.shape]
    return whole == list(names) and all(state[n].dtype is tensor.dtype for n in names)
