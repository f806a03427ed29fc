"""Hooks on trainable tensors, which may change a gradient after backward has made it.

They are taken off for one backward pass and called by hand, so that the gradient is known without and with them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_CHANGED = 1e-3
"""Distance of two gradients, relative to their norm, from which on one counts as changed: bfloat16 rounds by 4e-3."""
_SAME = 1e-5
Hook = Callable[[Tensor], Tensor | None]


@dataclass(frozen=True, kw_only=True)
class Hooked:
    """A gradient that hooks on its tensor change."""

    tensor: str
    """Name of the tensor."""
    hook: str
    """The first of its hooks that changes it, with file and line."""
    distance: float
    """Distance between the gradient before and after all of them, relative to the norm before."""
    factor: float | None
    """The one factor by which they multiply it; None if they do something else."""


@contextlib.contextmanager
def without_hooks(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, list[Hook]]]:
    """Take the hooks off `tensors` for the computation inside, and yield those of each tensor that has any."""
    held = {n: t._backward_hooks for n, t in tensors.items() if t._backward_hooks}
    for name in held:
        tensors[name]._backward_hooks = None
    try:
        yield {n: list(hooks.values()) for n, hooks in held.items()}
    finally:
        for name, hooks in held.items():
            tensors[name]._backward_hooks = hooks


def changed_by(hooks: list[Hook], name: str, gradient: Tensor) -> Hooked | None:
    """What `hooks` make of `gradient`; None where they leave it as it is, clip it, or set entries to zero.

    Clipping gives no more for a gradient that is twice as large; so it is told from a factor.
    """
    before = gradient.detach().clone()
    after, first = _called(hooks, before)
    norm = float(before.double().norm())
    distance = float((after.double() - before.double()).norm()) / norm if norm else 0.0
    if distance <= _CHANGED or not norm or _is_masked(before, after) or _is_clipped(before, after):
        return None
    twice, _ = _called(hooks, 2 * before)
    if _apart(twice, after) <= _SAME:
        return None
    factor = float((after.double() * before.double()).sum()) / norm**2
    of_one_factor = _apart(after, factor * before) <= _SAME
    return Hooked(tensor=name, hook=first, distance=distance, factor=factor if of_one_factor else None)


def _called(hooks: list[Hook], gradient: Tensor) -> tuple[Tensor, str]:
    """The gradient after all hooks, and the first one that changed it."""
    first = ""
    with torch.no_grad():
        for hook in hooks:
            given = gradient.clone()
            result = hook(given)
            # a hook may also write into what it is given
            result = given if result is None else result.detach()
            if not first and not torch.equal(_plain(result), _plain(gradient)):
                first = _place(hook)
            gradient = result
    return _plain(gradient), first


def _plain(gradient: Tensor) -> Tensor:
    return gradient.to_dense() if gradient.is_sparse else gradient


def _apart(one: Tensor, other: Tensor) -> float:
    size = float(other.double().norm())
    return float((one.double() - other.double()).norm()) / size if size else float("inf")


def _is_masked(before: Tensor, after: Tensor) -> bool:
    """Whether each entry is the old one, or zero."""
    return bool(((after == _plain(before)) | (after == 0)).all())


def _is_clipped(before: Tensor, after: Tensor) -> bool:
    """Whether the entries are the old ones between two bounds."""
    if not bool(after.isfinite().all()):
        return False
    return torch.equal(after, _plain(before).clamp(after.min(), after.max()))


def _place(hook: Any) -> str:
    """Name, file and line of a hook."""
    plain = getattr(hook, "func", hook)
    name = getattr(plain, "__qualname__", type(plain).__qualname__)
    code = getattr(getattr(plain, "__func__", plain), "__code__", None) or getattr(
        type(plain).__call__, "__code__", None
    )
    return f"{name} at {code.co_filename}:{code.co_firstlineno}" if code is not None else str(name)
