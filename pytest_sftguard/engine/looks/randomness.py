"""The random numbers of the training's forward passes: whether dropout is on, and whether its masks differ."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pytest_sftguard.engine.adapter.adapters import config_of, lora_layers
from pytest_sftguard.engine.after import forwards
from pytest_sftguard.engine.looks import Look
from pytest_sftguard.engine.recording.watching import wrapped
from pytest_sftguard.engine.stages import Started
from pytest_sftguard.records import Names, RandomnessRecord

_STEPS = 2
"""Steps in which dropout layers have hooks: a hook costs its call."""
_MICRO_BATCHES = 8
"""Micro-batches whose generator is compared with those before it."""
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


class Randomness(Look[Started]):
    """Watches dropout layers and the generator of the device while a loss with a gradient is computed."""

    def attach(self, started: Started) -> None:
        """Hook the model and its dropout layers, and wrap the computation of the loss."""
        self._model, self._recorder = started.recorder.model, started.recorder
        self._in_loss, self._in_forward = False, False
        self._before = b""
        self._evaluating: bool | None = None
        self._alive: set[str] = set()
        self._off: set[str] = set()
        self._states: dict[bytes, int] = {}
        self._micro_batches, self._drawing = 0, 0
        self._repeated: tuple[int, int] | None = None
        factors = lora_layers(self._model)
        self._of_adapter: set[str] = set()
        self._hooks: list[Any] = [self._model.register_forward_pre_hook(self._note_mode)]
        for name, module in self._model.named_modules():
            if isinstance(module, _DROPOUTS):
                holder, _, _ = name.partition(".lora_dropout")
                if holder in factors and holder != name:
                    self._of_adapter.add(name)
                self._hooks.append(module.register_forward_pre_hook(functools.partial(self._note, name)))
        started.trainer.compute_loss = wrapped(started.trainer.compute_loss, self._compute_loss)

    def conclude(self, reached: Started) -> dict[str, Any]:
        """Return what was seen."""
        self._detach()
        called, own = self._alive | self._off, self._of_adapter
        asked = float(getattr(config_of(self._model), "lora_dropout", 0.0) or 0.0)
        return {
            "randomness": RandomnessRecord(
                evaluating=self._evaluating,
                base_dropout=_configured(forwards.inner(self._model)),
                adapter_dropout=asked,
                adapter_dropouts=len(called & own),
                adapter_off=Names.of(sorted(self._off & own)),
                other_dropouts=len(called - own),
                other_off=Names.of(sorted(self._off - own)),
                drawing=self._drawing,
                compared=min(self._micro_batches, _MICRO_BATCHES),
                repeated_step=self._repeated[0] if self._repeated else None,
                repeats_step=self._repeated[1] if self._repeated else None,
            )
        }

    def _compute_loss(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # an evaluation
        if not torch.is_grad_enabled():
            return original(*args, **kwargs)
        step = self._recorder.taken + 1
        if step > _STEPS:
            self._detach()
        watched = self._micro_batches < _MICRO_BATCHES
        self._before = self._state() if watched else b""
        self._in_loss, self._in_forward = True, False
        try:
            return original(*args, **kwargs)
        finally:
            self._in_loss = False
            self._micro_batches += 1
            if watched and self._state() != self._before:
                self._drawing += 1
                if self._repeated is None and self._before in self._states:
                    self._repeated = step, self._states[self._before]
                self._states.setdefault(self._before, step)

    def _note_mode(self, model: nn.Module, inputs: Any) -> None:
        if not (self._in_loss and torch.is_grad_enabled()):
            return
        self._evaluating = not model.training or bool(self._evaluating)
        # a seed may be set between the beginning of the loss and the forward pass
        if not self._in_forward and self._micro_batches < _MICRO_BATCHES:
            self._before = self._state()
        self._in_forward = True

    def _note(self, name: str, module: nn.Module, inputs: Any) -> None:
        if not (self._in_loss and torch.is_grad_enabled()):
            return
        p = float(getattr(module, "p", 0.0))
        if module.training and p > 0:
            self._alive.add(name)
        elif p > 0 or name in self._of_adapter:
            self._off.add(name)

    def _state(self) -> bytes:
        """Digest of the state of the generator that dropout draws from."""
        device = next(self._model.parameters()).device
        state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
        return hashlib.sha256(state.numpy().tobytes()).digest()

    def _detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def _configured(model: Any) -> float:
    """The largest dropout probability that the configuration of `model` asks for."""
    config = getattr(model, "config", None)
    values = vars(config) if config is not None else {}
    asked = [v for k, v in values.items() if "drop" in k and isinstance(v, (int, float)) and not isinstance(v, bool)]
    return max((float(v) for v in asked if 0 < v < 1), default=0.0)
