"""Watching the layers of a model: which of them a token passed through, and in which type they compute."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from pytest_sftguard.engine.adapter.adapters import lora_layers, product_layers
from pytest_sftguard.engine.recording.recorder import Recorder
from pytest_sftguard.engine.tensors.reductions import dtype_name

_Hook = tuple[Callable[..., Any], Callable[..., None]]
"""What puts a hook in its place, and the hook."""


class LayerWatch:
    """Hooks on the layers of the model that `recorder` sees, until `detach`.

    In the first step there is one on every layer. From then on, a hook on a decoder layer stands for those of its
    layers that were computed with it, and one decoder layer after the other, a step each, is looked at closely again.
    What is chosen within a decoder layer, as experts are, keeps hooks of its own.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.looking = True
        """Whether a forward pass now is one of the training's, whose types count."""
        self.autocast_dtype: str | None = None
        self._returned: dict[str, set[int]] = {}
        layers = lora_layers(recorder.model)
        self._blocks = _blocks(recorder.model, layers)
        self._on_layers, self._on_others = self._watch_layers(layers)
        self._turns: list[list[_Hook]] = []
        self._closely: list[Any] = []
        self._standing = _put([*self._on_layers.values(), *self._on_others])
        self._arranged: list[_Hook] | None = None
        self._buffer_hooks = self._watch_buffers()

    @property
    def compute_dtypes(self) -> dict[str, int]:
        """Types of what the adapted layers' products returned, with the number of layers."""
        return {dtype: len(layers) for dtype, layers in self._returned.items()}

    def detach(self) -> None:
        """Take the hooks off the model."""
        for hooks in (self._standing, self._closely, self._buffer_hooks):
            _take_off(hooks)
        self._on_layers, self._on_others, self._arranged, self._turns = {}, [], [], []

    def begin_micro_batch(self, *, first: bool) -> None:
        """Another micro-batch of the training begins, the `first` of its step or a later one.

        Where a token has passed through every layer in this step, there is nothing more to learn in it: a hook costs
        its call, and the module its fast way. In the first step all micro-batches are seen, for their types.
        """
        if not self.recorder.taken:
            return
        if first:
            self._stand()
        elif self._standing and self.recorder.all_layers_used:
            _take_off(self._standing)
            _take_off(self._closely)

    def _stand(self) -> None:
        """The hooks for a step after the first one."""
        if self._arranged is None:
            _take_off(self._standing)
            self._arranged, self._turns = self._arrange()
        if not self._standing:
            self._standing = _put(self._arranged)
        _take_off(self._closely)
        if self._turns:
            self._closely = _put(self._turns[self.recorder.taken % len(self._turns)])

    def _arrange(self) -> tuple[list[_Hook], list[list[_Hook]]]:
        """What stands in every step, and what takes turns."""
        standing: list[_Hook] = []
        alone, turns = dict(self._on_layers), []
        for block, names in self._blocks:
            if not self.recorder.ever_used.issuperset(names):
                continue
            standing.append((block.register_forward_pre_hook, self._note_block(frozenset(names))))
            turns.append([alone.pop(name) for name in names])
        if turns and self._on_others:
            turns.append(self._on_others)
        return [*standing, *alone.values(), *([] if turns else self._on_others)], turns

    def _watch_layers(self, layers: dict[str, nn.Module]) -> tuple[dict[str, _Hook], list[_Hook]]:
        """Hooks that note which layers a token passed through: an expert without one has no gradient, soundly.

        And of what type their products are. Where the product is a module within the layer, one hook does for both. A
        class that computes both in its own way is watched from outside: it may do so only where nobody looks at the
        product, and other ways round otherwise. Then the type is that of its result; and it counts as passed through
        where another such layer of its block was, so that one that a block leaves out is not taken for an expert.
        Those of the layers by name, and those of products that belong to none.
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
        return hooks, [(layer.register_forward_hook, self._note_product()) for layer in products.values()]

    def _note_block(self, names: frozenset[str]) -> Callable[..., None]:
        def note(module: Any, inputs: Any) -> None:
            if not (inputs and isinstance(inputs[0], torch.Tensor) and not inputs[0].numel()):
                self.recorder.used_layers |= names

        return note

    def _note_use(self, name: str) -> Callable[..., None]:
        def note(module: Any, inputs: Any, output: Any = None) -> None:
            if not (inputs and isinstance(inputs[0], torch.Tensor) and not inputs[0].numel()):
                self.recorder.used_layers.add(name)

        return note

    def _note_product(self, *names: str) -> Callable[..., None]:
        """Note the type of what the layer returned, and that a token passed through the layers called `names`."""
        seen: set[Any] = set()

        def note(module: Any, inputs: Any, output: Any) -> None:
            if names and not (inputs and isinstance(inputs[0], torch.Tensor) and not inputs[0].numel()):
                self.recorder.used_layers.update(names)
            if not self.looking or not isinstance(output, torch.Tensor):
                return
            device_type = output.device.type
            what = (output.dtype, torch.is_autocast_enabled(device_type))
            if what not in seen:
                seen.add(what)
                self._returned.setdefault(dtype_name(output.dtype), set()).add(id(module))
                if what[1]:
                    self.autocast_dtype = dtype_name(torch.get_autocast_dtype(device_type))

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


def _is_fused(layer: nn.Module) -> bool:
    """Whether it is one of peft's linear LoRA layers, but of a class with a forward of its own."""
    from peft.tuners.lora import Linear

    return isinstance(layer, Linear) and type(layer).forward is not Linear.forward and "forward" not in vars(layer)


def _put(hooks: Iterable[_Hook]) -> list[Any]:
    return [register(hook) for register, hook in hooks]


def _take_off(hooks: list[Any]) -> None:
    for hook in hooks:
        hook.remove()
    hooks.clear()


def _blocks(model: nn.Module, names: Iterable[str]) -> list[tuple[nn.Module, list[str]]]:
    """Elements of lists of modules, such as decoder layers, with those of `names` that are computed with them.

    What lies in a list within the element is not: an element is what a model chooses, or leaves out.
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
