"""Loading what a training saved, as its user will: with peft, with `load_adapter`, or as a whole model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pytest_sftguard.engine.adapter.adapters import (
    active_adapters,
    config_of,
    holder,
    in_file,
    of_adapter,
    takes_from_the_base,
)

_CONFIG = "adapter_config.json"
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")


class NotLoadableError(Exception):
    """A saved model that nobody but its own code can load; the message says why."""


class Reloading(Protocol):
    """How one type of model is saved and loaded."""

    partial: bool
    """Whether the file holds an adapter, which needs its base."""

    def written(self, folder: Path) -> bool:
        """Whether saving the model into `folder` wrote anything of what was trained."""

    def files(self, folder: Path) -> list[Path]:
        """The weight files that saving the model into `folder` made."""

    def tensors(self, trained: nn.Module, folder: Path) -> dict[str, Tensor]:
        """Tensors in the files of `trained`, by their names from `in_file`."""

    def kept(self, model: nn.Module) -> dict[str, Tensor]:
        """What the file of `model` has to hold, by names from `in_file`."""

    def base(self, fresh: nn.Module) -> tuple[nn.Module, bool]:
        """The base of a model that was built again, and whether it had to be put together by merging."""

    def loaded(self, base: nn.Module, folder: Path) -> nn.Module:
        """The model from `folder`, on that base. Raises what peft or transformers raises, or NotLoadableError."""


def reloading(trained: nn.Module) -> Reloading:
    """How `trained` is saved and loaded."""
    path, held = holder(trained)
    if not hasattr(held, "peft_config"):
        return _Whole()
    return _OfPeft(trained) if held is trained and hasattr(held, "get_base_model") else _Inside(path)


def saved_tensors(trained: nn.Module, folder: Path) -> dict[str, Tensor]:
    """Tensors in the files that saving `trained` made, by their names from `in_file`; none if there is no file."""
    return reloading(trained).tensors(trained, folder)


class _OfPeft:
    """A PeftModel: `PeftModel.from_pretrained` puts its file onto a base."""

    partial = True

    def __init__(self, trained: nn.Module) -> None:
        self._name = active_adapters(trained)[0]

    def _folder(self, folder: Path) -> Path:
        """Where peft saves the active adapter: in a subfolder, unless its name is `default`."""
        return folder if self._name == "default" or folder.name == self._name else folder / self._name

    def written(self, folder: Path) -> bool:
        return (self._folder(folder) / _CONFIG).exists()

    def files(self, folder: Path) -> list[Path]:
        return [p for n in _ADAPTER_FILES if (p := self._folder(folder) / n).exists()]

    def tensors(self, trained: nn.Module, folder: Path) -> dict[str, Tensor]:
        return {in_file(n): t for n, t in _read(self.files(folder))}

    def kept(self, model: Any) -> dict[str, Tensor]:
        config, name = config_of(model), active_adapters(model)[0]
        own = _own(model)
        if getattr(config, "is_prompt_learning", False):
            # what the encoder makes of its numbers is saved, not the encoder
            held = {n: t for n, t in own.items() if not n.startswith("prompt_encoder.")}
            prompt = model.prompt_encoder[name].embedding.weight
            # loaded for inference, the encoder is gone, and its result in place of its numbers
            saved = prompt if config.inference_mode else model.get_prompt_embedding_to_save(name)
            return held | {"prompt_embeddings": saved.detach()}
        for lora_e, left in (getattr(config, "rank_pattern", None) or {}).items():
            # only AdaLoRA's pattern is a list, of the ranks that are left
            if not isinstance(left, list):
                continue
            path = f"base_model.model.{lora_e.removesuffix(f'.{name}').removesuffix('.lora_E')}"
            for factor, rank_first in (("lora_E", True), ("lora_A", True), ("lora_B", False)):
                whole = own.get(f"{path}.{factor}")
                if whole is not None and whole.shape[0 if rank_first else 1] == len(left):
                    mask = torch.tensor(left, device=whole.device)
                    own[f"{path}.{factor}"] = whole[mask] if rank_first else whole[:, mask]
        return own

    def base(self, fresh: Any) -> tuple[nn.Module, bool]:
        restored = takes_from_the_base(fresh)
        if restored:
            base = fresh.merge_and_unload()
        elif getattr(fresh.active_peft_config, "is_prompt_learning", False):
            base = fresh.get_base_model()
        else:
            _put_originals_back(fresh)
            base = fresh.unload()
        if hasattr(base, "peft_config"):
            # `unload` leaves it behind, and peft warns of it
            del base.peft_config
        return base, restored

    def loaded(self, base: Any, folder: Path) -> nn.Module:
        from peft import PeftModel

        loaded: nn.Module = PeftModel.from_pretrained(base, str(self._folder(folder)))
        return loaded


def _put_originals_back(model: nn.Module) -> None:
    """Replace the trained copies of `modules_to_save`: peft 0.21 unloads none that has no weight of its own."""
    from peft.utils.other import ModulesToSaveWrapper

    copies = [(n, m) for n, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)]
    for name, module in copies:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module.original_module)


class _Inside:
    """A transformers model after `add_adapter`, or a model that holds one, or a PeftModel, inside."""

    partial = True

    def __init__(self, path: str) -> None:
        self._path = path

    def written(self, folder: Path) -> bool:
        return any(folder.rglob(_CONFIG))

    def files(self, folder: Path) -> list[Path]:
        homes = sorted(c.parent for c in folder.rglob(_CONFIG))
        return [p for home in homes[:1] for n in _ADAPTER_FILES if (p := home / n).exists()]

    def tensors(self, trained: nn.Module, folder: Path) -> dict[str, Tensor]:
        before, within = "base_model.model.", f"{self._path}." if self._path else ""
        own = hasattr(holder(trained)[1], "get_base_model")
        return {in_file(within + (n if own else n.removeprefix(before))): t for n, t in _read(self.files(folder))}

    def kept(self, model: nn.Module) -> dict[str, Tensor]:
        return _own(model)

    def base(self, fresh: nn.Module) -> tuple[nn.Module, bool]:
        return fresh, False

    def loaded(self, base: nn.Module, folder: Path) -> nn.Module:
        files, held = self.files(folder), holder(base)[1]
        if not files:
            raise FileNotFoundError(f"saving the model wrote no {_ADAPTER_FILES[0]} beside a {_CONFIG}")
        name = active_adapters(base)[0]
        if hasattr(held, "load_adapter") and hasattr(held, "get_base_model"):
            held.load_adapter(str(files[0].parent), "reloaded")
            held.set_adapter("reloaded")
        else:
            held.delete_adapter(name)
            held.load_adapter(str(files[0].parent), adapter_name=name)
        return base


class _Whole:
    """A model without an adapter: all of it is in the file."""

    partial = False

    def written(self, folder: Path) -> bool:
        return bool(self.files(folder))

    def files(self, folder: Path) -> list[Path]:
        return sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")])

    def tensors(self, trained: nn.Module, folder: Path) -> dict[str, Tensor]:
        return {in_file(n): t for n, t in _read(self.files(folder))}

    def kept(self, model: nn.Module) -> dict[str, Tensor]:
        return _own(model)

    def base(self, fresh: nn.Module) -> tuple[nn.Module, bool]:
        return fresh, False

    def loaded(self, base: nn.Module, folder: Path) -> nn.Module:
        if hasattr(type(base), "from_pretrained"):
            return from_pretrained(base, folder)
        found = base.load_state_dict(dict(_read(self.files(folder))), strict=False)
        if found.unexpected_keys:
            raise NotLoadableError(f"a {type(base).__name__} has no from_pretrained, and its file has other names")
        return base


def from_pretrained(like: nn.Module, folder: Path) -> nn.Module:
    """The model saved in `folder`, loaded by the class of `like`, in its type and with its attention.

    No file holds the choice of attention, and some models make it only when they are built.
    """
    model_class: Any = type(like)
    attention = _attention(like.config) if isinstance(like, PreTrainedModel) else {}
    loaded: nn.Module = model_class.from_pretrained(str(folder), dtype=next(like.parameters()).dtype, **attention)
    return loaded


def _attention(config: Any) -> dict[str, Any]:
    """The argument of `from_pretrained` for the attention of a model and its towers; none where there is no choice."""
    parts = {"": config} | {name: getattr(config, name, None) for name in getattr(config, "sub_configs", {})}
    chosen = {name: getattr(part, "_attn_implementation", None) for name, part in parts.items()}
    chosen = {name: attention for name, attention in chosen.items() if isinstance(attention, str)}
    if "" not in chosen:
        return {}
    return {"attn_implementation": chosen if len(chosen) > 1 else chosen[""]}


def _own(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the active adapter; with the frozen ones, because peft saves these too."""
    name, ours = active_adapters(model)[0], of_adapter(model)
    return {in_file(n, name): p for n, p in model.named_parameters() if ours(n) and "original_module" not in n}


def _read(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    from safetensors.torch import load_file

    for path in files:
        loaded = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
        yield from loaded.items()
