"""Watching the layers of a model: which of them a token passed through, and in which type they compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pytest_sftguard.engine.adapters import lora_layers, product_layers
from pytest_sftguard.engine.recording import Recorder
from pytest_sftguard.engine.tensors import dtype_name


class LayerWatch:
    """Hooks on the layers of the model that `recorder` sees, until `detach`."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.looking = True
        """Whether a forward pass now is one of the training's, whose types count."""
        self.autocast_dtype: str | None = None
        self._returned: dict[str, set[int]] = {}
        self._on_layers = self._watch_layers()
        self._layer_hooks = [register(hook) for register, hook in self._on_layers]
        self._buffer_hooks = self._watch_buffers()

    @property
    def compute_dtypes(self) -> dict[str, int]:
        """Types of what the adapted layers' products returned, with the number of layers."""
        return {dtype: len(layers) for dtype, layers in self._returned.items()}

    def detach(self) -> None:
        """Take the hooks off the model."""
        for hook in [*self._layer_hooks, *self._buffer_hooks]:
            hook.remove()
        self._layer_hooks, self._buffer_hooks, self._on_layers = [], [], []

    def begin_micro_batch(self, *, first: bool) -> None:
        """Another micro-batch of the training begins, the `first` of its step or a later one.

        Where a token has passed through every layer in this step, there is nothing more to learn in it: a hook costs
        its call, and the module its fast way. In the first step all micro-batches are seen, for their types.
        """
        if first and not self._layer_hooks:
            self._layer_hooks = [register(hook) for register, hook in self._on_layers]
        elif not first and self._layer_hooks and self.recorder.steps and self.recorder.all_layers_used:
            for hook in self._layer_hooks:
                hook.remove()
            self._layer_hooks = []

    def _watch_layers(self) -> list[tuple[Callable[..., Any], Callable[..., None]]]:
        """Hooks that note which layers a token passed through: an expert without one has no gradient, soundly.

        And of what type their products are. Where the product is a module within the layer, one hook does for both.
        Beside each hook stands what puts it in its place.
        """
        products = {id(layer): layer for layer in product_layers(self.recorder.model)}
        hooks: list[tuple[Callable[..., Any], Callable[..., None]]] = []
        for name, layer in lora_layers(self.recorder.model).items():
            product = products.pop(id(layer.base_layer), None)
            if product is None:
                hooks.append((layer.register_forward_pre_hook, self._note_use(name)))
            else:
                hooks.append((product.register_forward_hook, self._note_product(name)))
        return hooks + [(layer.register_forward_hook, self._note_product("")) for layer in products.values()]

    def _note_use(self, name: str) -> Callable[..., None]:
        def note(module: Any, inputs: Any, output: Any = None) -> None:
            if not (inputs and isinstance(inputs[0], torch.Tensor) and not inputs[0].numel()):
                self.recorder.used_layers.add(name)

        return note

    def _note_product(self, name: str) -> Callable[..., None]:
        """Note the type of what the layer returned, and that a token passed through the layer called `name`."""
        seen: set[Any] = set()

        def note(module: Any, inputs: Any, output: Any) -> None:
            if name and not (inputs and isinstance(inputs[0], torch.Tensor) and not inputs[0].numel()):
                self.recorder.used_layers.add(name)
            if not self.looking or not isinstance(output, torch.Tensor):
                return
            kind = output.device.type
            what = (output.dtype, torch.is_autocast_enabled(kind))
            if what not in seen:
                seen.add(what)
                self._returned.setdefault(dtype_name(output.dtype), set()).add(id(module))
                if what[1]:
                    self.autocast_dtype = dtype_name(torch.get_autocast_dtype(kind))

        return note

    def _watch_buffers(self) -> list[Any]:
        """Hooks that note which buffers outside the state dict the model's own forward pass rewrites.

        Rotary frequencies that follow the length of the batch (dynamic, longrope) are such: working memory, no base.
        """
        model = self.recorder.model
        places = [(n, m, b) for n, m in model.named_modules() for b in m._non_persistent_buffers_set]
        before: list[Any] = []

        def versions() -> list[Any]:
            tensors = [m._buffers.get(b) for _, m, b in places]
            return [t if t is None else (t, t._version) for t in tensors]  # the tensor itself: ids are used again

        def remember(module: Any, inputs: Any) -> None:
            before[:] = versions()

        def compare(module: Any, inputs: Any, output: Any) -> None:
            for (name, _, buffer), old, new in zip(places, before, versions(), strict=True):
                if (old is None) != (new is None) or (old and new and (old[0] is not new[0] or old[1] != new[1])):
                    self.recorder.rewritten.add(f"{name}.{buffer}" if name else buffer)

        if not places:
            return []
        return [model.register_forward_pre_hook(remember), model.register_forward_hook(compare)]
