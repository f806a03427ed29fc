"""Base models read from disk once per process: every later cell gets a model of its own with the same bytes.

The tensors of a loaded checkpoint are written to one file, which every model maps into its memory privately. All models
share the pages, and the kernel copies a page when a model writes to it. So no cell can leave a trace in the next,
whatever it does to its base.

A checkpoint is kept only if a second load would give the same bits: a local folder, complete, loaded without random
numbers, with plain tensors on the CPU.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LARGEST_BYTES = 4 << 30
"""Larger checkpoints are read each time, because their copy would cost more disk than it saves."""
_ALIGNMENT = 64


class Bases:
    """The checkpoints that were loaded within `shared()`."""

    def __init__(self) -> None:
        self._kept: dict[tuple[Any, Any], _Checkpoint] = {}
        self.reused = 0
        """Number of models that were made without reading their checkpoint."""

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """Make `from_pretrained` of transformers' models read each checkpoint once."""
        from transformers import PreTrainedModel

        original = PreTrainedModel.__dict__["from_pretrained"]

        @functools.wraps(original.__func__)
        def from_pretrained(cls: Any, name: Any = None, *args: Any, **kwargs: Any) -> Any:
            load, asked = original.__get__(None, cls), kwargs.pop("output_loading_info", False)
            key = _key(cls, name, args, kwargs)
            if key is None:
                return load(name, *args, **kwargs, **({"output_loading_info": True} if asked else {}))
            # the function is a part of the key: a fault may have wrapped it since
            kept = self._kept.get((original.__func__, key))
            if kept is not None:
                self.reused += 1
                return kept.model() if asked else kept.model()[0]
            before = torch.get_rng_state()
            model, info = load(name, *args, **kwargs, output_loading_info=True)
            if torch.equal(before, torch.get_rng_state()) and _can_be_kept(model, info):
                self._kept[original.__func__, key] = _Checkpoint(model, info)
            return (model, info) if asked else model

        PreTrainedModel.from_pretrained = classmethod(from_pretrained)
        try:
            yield
        finally:
            PreTrainedModel.from_pretrained = original


class _Checkpoint:
    """One loaded checkpoint: its tensors in a file, and a model that maps them."""

    def __init__(self, model: Any, info: Any) -> None:
        folder = tempfile.TemporaryDirectory(prefix="sftguard-base-", ignore_cleanup_errors=True)
        weakref.finalize(self, folder.cleanup)
        self._path, self._info = Path(folder.name) / "tensors", info
        self._offsets = []
        with self._path.open("wb") as file:
            for tensor in _tensors(model):
                file.write(b"\0" * (-file.tell() % _ALIGNMENT))
                self._offsets.append(file.tell())
                file.write(tensor.detach().flatten().view(torch.uint8).numpy().data)
            self._bytes = file.tell()
        # `model` belongs to the cell that loaded it, which may change it
        self._model = self._mapped(model)

    def model(self) -> tuple[Any, Any]:
        """Another model with the same bytes, and the loading info of the first."""
        return self._mapped(self._model), copy.deepcopy(self._info)

    def _mapped(self, model: Any) -> Any:
        storage = torch.UntypedStorage.from_file(str(self._path), False, self._bytes)
        memo: dict[int, Any] = {}
        for tensor, offset in zip(_tensors(model), self._offsets, strict=True):
            bare = torch.empty(0, dtype=tensor.dtype)
            bare.set_(storage, offset // tensor.element_size(), tensor.shape)  # type: ignore[call-overload]
            memo[id(tensor)] = nn.Parameter(bare, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else bare
        return copy.deepcopy(model, memo)


def _tensors(model: nn.Module) -> list[Tensor]:
    """Every parameter and buffer, each once."""
    return [*model.parameters(), *model.buffers()]


def _can_be_kept(model: Any, info: Any) -> bool:
    """Whether a second load would give the same bits, and the model consists of nothing but plain tensors."""
    tensors = _tensors(model)
    plain = all(
        type(t) in (Tensor, nn.Parameter) and t.device.type == "cpu" and t.is_contiguous() and not t.is_complex()
        for t in tensors
    )
    return (
        plain
        and 0 < sum(t.nbytes for t in tensors) <= LARGEST_BYTES
        and getattr(model, "hf_quantizer", None) is None
        and not info.get("missing_keys")
        and not info.get("mismatched_keys")
    )


def _key(cls: Any, name: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Everything that the result of a load depends on; None if that is not known completely."""
    if args or not isinstance(name, (str, Path)) or not Path(name).is_dir():
        return None
    try:
        arguments = _comparable(kwargs)
    except TypeError:
        return None
    files = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(Path(name).iterdir()) if p.is_file()]
    return cls, str(name), arguments, tuple(files), torch.get_default_dtype(), str(torch.get_default_device())


def _comparable(value: Any) -> Any:
    """An argument as a value that can be hashed and compared. Raises TypeError if its type has none."""
    if isinstance(value, dict):
        return tuple((k, _comparable(v)) for k, v in sorted(value.items()))
    if isinstance(value, (list, tuple)):
        return tuple(map(_comparable, value))
    # a configuration
    if hasattr(value, "to_json_string"):
        return type(value), value.to_json_string(use_diff=False)
    if value is None or isinstance(value, (bool, int, float, str, Path, torch.dtype)):
        return value
    raise TypeError(f"an argument of type {type(value).__name__}")
