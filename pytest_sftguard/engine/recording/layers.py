"""Hooks on the layers of a model: which of them a token passed through, and in which type they compute."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from pytest_sftguard.engine.adapter.adapters import lora_layers, other_products, product_layers
from pytest_sftguard.engine.building import quantised
from pytest_sftguard.engine.recording.recorder import Recorder
from pytest_sftguard.engine.surroundings.errors import own_work
from pytest_sftguard.engine.tensors.reductions import dtype_name

_Hook = tuple[Callable[..., Any], Callable[..., None]]
"""The method that registers a hook, and the hook."""


class LayerWatch:
    """Hooks on the layers of the recorder's model, until `detach`.

    In the first step every layer has a hook. After it, one hook on a decoder layer replaces those of the layers that
    are always computed with it; in each step another decoder layer has its detailed hooks back. Layers that a decoder
    layer chooses between, such as experts, keep their hooks. Each hook works within `around`.
    """

    @own_work
    def __init__(self, recorder: Recorder, around: contextlib.ContextDecorator = own_work) -> None:
        self.recorder = recorder
        self._around = around
        self.looking = True
        """Whether a forward pass is one of the training, whose types count."""
        self.autocast_dtype: str | None = None
        self._returned: dict[str, set[int]] = {}
        self._elsewhere: dict[str, set[int]] = {}
        layers = lora_layers(recorder.model)
        self._blocks = _blocks(recorder.model, layers)
        self._layer_hooks, self._product_hooks = self._watch_layers(layers)
        self._rotation: list[list[_Hook]] = []
        self._detailed: list[Any] = []
        self._registered = _register([*self._layer_hooks.values(), *self._product_hooks])
        self._every_step: list[_Hook] | None = None
        self._buffer_hooks = self._watch_buffers()

    @property
    def compute_dtypes(self) -> dict[str, int]:
        """Result types of the adapted layers' products, with the number of layers.

        Those of other linear layers where the adapted ones have no product of their own: some adapters change an
        embedding or a norm, or put a matrix of their own in the place of the layer's.
        """
        return {dtype: len(layers) for dtype, layers in (self._returned or self._elsewhere).items()}

    def detach(self) -> None:
        """Remove all hooks."""
        for hooks in (self._registered, self._detailed, self._buffer_hooks):
            _remove(hooks)
        self._layer_hooks, self._product_hooks, self._every_step, self._rotation = {}, [], [], []

    @own_work
    def begin_micro_batch(self, *, first: bool) -> None:
        """Begin a micro-batch of the training, the `first` of its step or a later one.

        Once a token has passed through every layer, the hooks have nothing more to find in the step, and are removed: a
        hook costs its call, and the fast path of its module's. In the first step they stay, for the types.
        """
        if not self.recorder.taken:
            return
        if first:
            self._hook_step()
        elif self._registered and self.recorder.all_layers_used:
            _remove(self._registered)
            _remove(self._detailed)

    def _hook_step(self) -> None:
        """Register the hooks for a step after the first one."""
        if self._every_step is None:
            _remove(self._registered)
            self._every_step, self._rotation = self._arrange()
        if not self._registered:
            self._registered = _register(self._every_step)
        _remove(self._detailed)
        if self._rotation:
            self._detailed = _register(self._rotation[self.recorder.taken % len(self._rotation)])

    def _arrange(self) -> tuple[list[_Hook], list[list[_Hook]]]:
        """The hooks of every step, and lists of detailed hooks, one of which each step has in rotation."""
        blocks: list[_Hook] = []
        alone, rotation = dict(self._layer_hooks), []
        for block, names in self._blocks:
            if not self.recorder.ever_used.issuperset(names):
                continue
            blocks.append((block.register_forward_pre_hook, self._note_use(*names)))
            rotation.append([alone.pop(name) for name in names])
        if rotation and self._product_hooks:
            rotation.append(self._product_hooks)
        return [*blocks, *alone.values(), *([] if rotation else self._product_hooks)], rotation

    def _watch_layers(self, layers: dict[str, nn.Module]) -> tuple[dict[str, _Hook], list[_Hook]]:
        """Hooks of the layers by name, and hooks of products outside of them.

        They record the layers that a token passed through, because an expert without a token rightly has no gradient,
        and the types of the products. If the product is a module in the layer, one hook on it records both. A fused
        class has its hook outside, because a hook on its product could switch it to an unfused path; its type is that
        of its result. It counts as used if another fused layer of its block was, so that a layer that the block does
        without is not mistaken for an expert.
        """
        products = {id(layer): layer for layer in product_layers(self.recorder.model)}
        fused = {name for name, layer in layers.items() if _is_fused(layer)}
        inside = [fused.intersection(names) for _, names in self._blocks]
        hooks: dict[str, _Hook] = {}
        for name, layer in layers.items():
            product = products.pop(id(layer.base_layer), None)
            if product is None:
                hooks[name] = layer.register_forward_pre_hook, self._note_use(name)
            elif name in fused:
                others = next((names for names in inside if name in names), {name})
                hooks[name] = partial(layer.register_forward_hook, prepend=True), self._note_product(*others)
            else:
                hooks[name] = product.register_forward_hook, self._note_product(name)
        rest = [(layer.register_forward_hook, self._note_product()) for layer in products.values()]
        elsewhere = self._note_product(kept=self._elsewhere)
        return hooks, rest + [(layer.register_forward_hook, elsewhere) for layer in other_products(self.recorder.model)]

    def _note_use(self, *names: str) -> Callable[..., None]:
        """Record that a token passed through the layers `names`."""
        used = frozenset(names)

        @self._around
        @own_work
        def note(module: Any, inputs: Any) -> None:
            if not (inputs and isinstance(inputs[0], torch.Tensor) and not inputs[0].numel()):
                self.recorder.used_layers |= used

        return note

    def _note_product(self, *names: str, kept: dict[str, set[int]] | None = None) -> Callable[..., None]:
        """Record the type of the layer's result in `kept`, and that a token passed through the layers `names`."""
        returned = self._returned if kept is None else kept
        seen: set[Any] = set()

        @self._around
        @own_work
        def note(module: Any, inputs: Any, output: Any) -> None:
            if names and not (inputs and isinstance(inputs[0], torch.Tensor) and not inputs[0].numel()):
                self.recorder.used_layers.update(names)
            if not self.looking or not isinstance(output, torch.Tensor):
                return
            device_type = output.device.type
            if quantised.is_rearranged(module):
                self.recorder.rearranged.update(names)
            what = (_arithmetic(module, output), torch.is_autocast_enabled(device_type))
            if what not in seen:
                seen.add(what)
                returned.setdefault(dtype_name(what[0]), set()).add(id(module))
                if what[1]:
                    self.autocast_dtype = dtype_name(torch.get_autocast_dtype(device_type))

        return note

    def _watch_buffers(self) -> list[Any]:
        """Hooks that record which buffers outside the state dict the model's own forward pass rewrites.

        Such buffers, like rotary frequencies that follow the length of the batch (dynamic, longrope), are not part of
        the base.
        """
        model = self.recorder.model
        places = [(n, m, b) for n, m in model.named_modules() for b in m._non_persistent_buffers_set]
        before: list[Any] = []

        def versions() -> list[Any]:
            # the tensors themselves, because Python reuses ids
            tensors = [m._buffers.get(b) for _, m, b in places]
            return [t if t is None else (t, t._version) for t in tensors]

        @self._around
        @own_work
        def remember(module: Any, inputs: Any) -> None:
            before[:] = versions()

        @self._around
        @own_work
        def compare(module: Any, inputs: Any, output: Any) -> None:
            for (name, _, buffer), old, new in zip(places, before, versions(), strict=True):
                if (old is None) != (new is None) or (old and new and (old[0] is not new[0] or old[1] != new[1])):
                    self.recorder.rewritten.add(f"{name}.{buffer}" if name else buffer)

        if not places:
            return []
        return [model.register_forward_pre_hook(remember), model.register_forward_hook(compare)]


def _arithmetic(module: Any, output: torch.Tensor) -> torch.dtype:
    """The type of a layer's product: that of its result, but for a quantised layer of bitsandbytes.

    That one computes in its own `compute_dtype`, and returns the type of its input.
    """
    own, weight = getattr(module, "compute_dtype", None), getattr(module, "weight", None)
    return own if isinstance(own, torch.dtype) and hasattr(weight, "quant_state") else output.dtype


def _is_fused(layer: nn.Module) -> bool:
    """Whether a layer is a subclass of peft's linear LoRA layer with a forward method of its own."""
    from peft.tuners.lora import Linear

    return isinstance(layer, Linear) and type(layer).forward is not Linear.forward and "forward" not in vars(layer)


def _register(hooks: Iterable[_Hook]) -> list[Any]:
    return [register(hook) for register, hook in hooks]


def _remove(hooks: list[Any]) -> None:
    for hook in hooks:
        hook.remove()
    hooks.clear()


def _blocks(model: nn.Module, names: Iterable[str]) -> list[tuple[nn.Module, list[str]]]:
    """Elements of module lists, such as decoder layers, with those of `names` that are always computed with them.

    Layers in a nested list are left out, because a model may choose between the elements of a list.
    """
    modules = dict(model.named_modules())
    held: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        paths = [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
        elements = [p for p in paths if isinstance(modules.get(p.rpartition(".")[0]), (nn.ModuleList, nn.ModuleDict))]
        if len(elements) == 1:
            held.setdefault(elements[0], []).append(name)
    return [(modules[element], inside) for element, inside in held.items() if len(inside) > 1]
