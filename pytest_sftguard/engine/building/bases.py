"""Base models read from disk once: every later cell of the process gets the same bytes, and a model of its own.

The tensors of a checkpoint that `from_pretrained` has loaded are kept in a file that models map into their memory,
privately: all of them share the pages, and what one of them writes is its own, copied by the kernel at that moment. So
no cell can leave a trace in the next, whatever it does to its base, and there is nothing to take off a base again.

Only what a second load would give bit for bit is kept: local folders, whole checkpoints that drew no random numbers,
plain tensors on the CPU.
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
"""Checkpoints above are read each time: their copy would take more of the disk than it saves."""
_ALIGNMENT = 64


class Bases:
    """Keeps the checkpoints that are loaded within `shared()`."""

    def __init__(self) -> None:
        self._kept: dict[tuple[Any, Any], _Kept] = {}
        self.reused = 0
        """How many models were given out without reading their checkpoint."""

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """Let `from_pretrained` of transformers' models read each checkpoint once."""
        from transformers import PreTrainedModel

        original = PreTrainedModel.__dict__["from_pretrained"]

        @functools.wraps(original.__func__)
        def from_pretrained(cls: Any, name: Any = None, *args: Any, **kwargs: Any) -> Any:
            load, asked = original.__get__(None, cls), kwargs.pop("output_loading_info", False)
            key = _key(cls, name, args, kwargs)
            if key is None:
                return load(name, *args, **kwargs, **({"output_loading_info": True} if asked else {}))
            # a loading that somebody has wrapped meanwhile, as a fault does, is another one
            kept = self._kept.get((original.__func__, key))
            if kept is not None:
                self.reused += 1
                return kept.again() if asked else kept.again()[0]
            before = torch.get_rng_state()
            model, info = load(name, *args, **kwargs, output_loading_info=True)
            if torch.equal(before, torch.get_rng_state()) and _can_be_kept(model, info):
                self._kept[original.__func__, key] = _Kept(model, info)
            return (model, info) if asked else model

        PreTrainedModel.from_pretrained = classmethod(from_pretrained)
        try:
            yield
        finally:
            PreTrainedModel.from_pretrained = original


class _Kept:
    """One loaded checkpoint: its tensors in a file, and the modules that hold them."""

    def __init__(self, model: Any, info: Any) -> None:
        folder = tempfile.TemporaryDirectory(prefix="sftguard-base-", ignore_cleanup_errors=True)
        weakref.finalize(self, folder.cleanup)
        self._path, self._info = Path(folder.name) / "tensors", info
        places = []
        with self._path.open("wb") as file:
            for tensor in _tensors(model):
                file.write(b"\0" * (-file.tell() % _ALIGNMENT))
                places.append(file.tell())
                file.write(tensor.detach().flatten().view(torch.uint8).numpy().data)
            self._bytes = file.tell()
        self._model = self._mapped(model, places)  # the one that was loaded may be changed from now on
        self._places = places

    def again(self) -> tuple[Any, Any]:
        """Another model of the same bytes, and what was said of its loading."""
        return self._mapped(self._model, self._places), copy.deepcopy(self._info)

    def _mapped(self, model: Any, places: list[int]) -> Any:
        storage = torch.UntypedStorage.from_file(str(self._path), False, self._bytes)
        memo: dict[int, Any] = {}
        for tensor, place in zip(_tensors(model), places, strict=True):
            bare = torch.empty(0, dtype=tensor.dtype)
            bare.set_(storage, place // tensor.element_size(), tensor.shape)  # type: ignore[call-overload]
            memo[id(tensor)] = nn.Parameter(bare, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else bare
        return copy.deepcopy(model, memo)


def _tensors(model: nn.Module) -> list[Tensor]:
    """Every parameter and buffer, once."""
    return [*model.parameters(), *model.buffers()]


def _can_be_kept(model: Any, info: Any) -> bool:
    """Whether a second load would give the same, and a copy of the tensors is all that there is to it."""
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
    """What a load depends on; None where that is not known to the last bit."""
    if args or not isinstance(name, (str, Path)) or not Path(name).is_dir():
        return None
    try:
        said = _said(kwargs)
    except TypeError:
        return None
    files = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(Path(name).iterdir()) if p.is_file()]
    return cls, str(name), said, tuple(files), torch.get_default_dtype(), str(torch.get_default_device())


def _said(value: Any) -> Any:
    """A value of an argument as something to compare. Raises TypeError for what cannot be told from another."""
    if isinstance(value, dict):
        return tuple((k, _said(v)) for k, v in sorted(value.items()))
    if isinstance(value, (list, tuple)):
        return tuple(map(_said, value))
    if hasattr(value, "to_json_string"):  # a configuration
        return type(value), value.to_json_string(use_diff=False)
    if value is None or isinstance(value, (bool, int, float, str, Path, torch.dtype)):
        return value
    raise TypeError(f"an argument of type {type(value).__name__}")
