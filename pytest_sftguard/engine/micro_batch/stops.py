"""Stop-gradients: values that a loss treats as constant, held at what they were while the weights are moved.

A loss with a stop-gradient on purpose (DoRA's norm, a teacher that is the model itself) has a gradient that is the
derivative with these values held, and not the derivative of the loss as it is.
"""

from __future__ import annotations

import contextlib
import site
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import accelerate
import peft
import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

_CONSTANT = {torch.Tensor.detach, torch.detach, torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.__float__}
_CHOICES = {torch.topk, torch.Tensor.topk}
_TORCH = str(torch.__path__[0])
_PACKAGES = [Path(package.__path__[0]) for package in (torch, transformers, peft, accelerate)]
_FOLDERS = {p.parent for p in _PACKAGES if p.parent.name in ("site-packages", "dist-packages")}
# an environment may take its libraries from another one
_LIBRARIES = tuple(
    {
        *site.getsitepackages(),
        *(sysconfig.get_paths()[name] for name in ("stdlib", "purelib")),
        *map(str, (*_PACKAGES, *_FOLDERS)),
    }
)
"""Folders of the code that is no user's own."""


class OtherCallsError(Exception):
    """The loss called other stop-gradients than the first time, so that their values cannot be held."""


@dataclass
class _Stop:
    """One call whose value is held."""

    function: Any
    place: str
    """File and line of the call."""
    own: bool
    """Whether it stands in the user's code, and ran within a layer of the model."""
    value: Any


class Stops:
    """The stop-gradients of one loss, and their values in the first computation."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._layers = {id(m) for m in model.modules() if m is not model}
        self._stops: list[_Stop] = []
        self._teacher: list[Any] = []

    @property
    def places(self) -> list[str]:
        """Places in the user's code at which a layer of the model stops gradients."""
        return list(dict.fromkeys(s.place for s in self._stops if s.own))

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Note the values of the computation inside."""
        self._stops, self._teacher = [], []
        with self._passes_without_gradient(noting=True), _Mode(self, None):
            yield

    @contextlib.contextmanager
    def held(self, but: str = "") -> Iterator[None]:
        """Hold the values during the computation inside, except for those of the place `but`.

        Raises OtherCallsError where the computation calls other ones.
        """
        mode = _Mode(self, iter(self._stops), but)
        with self._passes_without_gradient(noting=False), mode:
            yield

    @contextlib.contextmanager
    def _passes_without_gradient(self, noting: bool) -> Iterator[None]:
        """Hold whole forward passes under `no_grad`: those of a teacher."""
        model: Any = self.model
        original, values = model.forward, iter(tuple(self._teacher))

        def forward(*args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled():
                return original(*args, **kwargs)
            if not noting:
                try:
                    return _copy(next(values))
                except StopIteration:
                    raise OtherCallsError("another forward pass without gradients") from None
            out = original(*args, **kwargs)
            self._teacher.append(_copy(out))
            return out

        was_own = "forward" in vars(model)
        model.forward = forward
        try:
            yield
        finally:
            if was_own:
                model.forward = original
            else:
                del model.forward

    def note(self, function: Any, value: Any) -> None:
        """Keep a copy of `value`, which `function` returned."""
        place, own = self._called_from()
        kept = value[1].clone() if function in _CHOICES else _copy(value)
        self._stops.append(_Stop(function, place, own, kept))

    def _called_from(self) -> tuple[str, bool]:
        frame: FrameType | None = sys._getframe(3)
        place, library, inside = "", True, False
        while frame is not None:
            name = frame.f_code.co_filename
            if not place and not name.startswith(_TORCH) and name != __file__:
                place = f"{name}:{frame.f_lineno}"
                library = name.startswith(_LIBRARIES)
            if frame.f_code.co_name == "_call_impl" and id(frame.f_locals.get("self")) in self._layers:
                inside = True
                break
            frame = frame.f_back
        return place, inside and not library


# torch does not type this class
class _Mode(TorchFunctionMode):  # type: ignore[misc,unused-ignore]
    """Notes or holds what the functions that stop gradients return."""

    def __init__(self, stops: Stops, held: Iterator[_Stop] | None, but: str = "") -> None:
        super().__init__()
        self._own, self._held, self._but = stops, held, but

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func`, and note or replace what it returns."""
        value = func(*args, **(kwargs or {}))
        # within a Function, or under no_grad, nothing has a gradient that could be stopped
        if not torch.is_grad_enabled() or func not in _CONSTANT | _CHOICES or not _depends(args):
            return value
        if self._held is None:
            self._own.note(func, value)
            return value
        stop = next(self._held, None)
        if stop is None or stop.function != func:
            raise OtherCallsError("other stop-gradients than in the first computation")
        if stop.place == self._but:
            return value
        if func in _CHOICES:
            dim = (kwargs or {}).get("dim", args[2] if len(args) > 2 else -1)
            return type(value)((torch.gather(args[0], dim, stop.value), stop.value))
        return _copy(stop.value)


def _depends(args: Any) -> bool:
    return bool(args) and isinstance(args[0], Tensor) and args[0].requires_grad


def _copy(value: Any) -> Any:
    return tree_map(lambda t: t.detach().clone() if isinstance(t, Tensor) else t, value)
