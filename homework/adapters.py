"""An adapter on disk: saved beside the digest of its base, loaded strictly, never in part.

The folder holds `adapter_config.json`, `adapter_model.safetensors` and `base.json`, which names the base, the sha256 of
the base's values and the sha256 of the adapter's file.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .base import digest, first_line

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
BASE = "base.json"


class AdapterError(ValueError):
    """An adapter that cannot be saved or loaded; the message says why."""


def check_output(folder: Path) -> list[Path]:
    """Make sure that `folder` can be written, by writing, and return the folders made, deepest first.

    Raises AdapterError where it cannot be.
    """
    try:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x" * 4096)
            file.flush()
    except FileExistsError as error:
        raise AdapterError(f"the output folder {folder} is a file") from error
    except OSError as error:
        raise AdapterError(f"the output folder {folder} cannot be written: {error.strerror or error}") from error
    return made


def drop_if_empty(folders: Sequence[Path]) -> None:
    """Remove folders in which nothing was written, deepest first."""
    try:
        for folder in folders:
            folder.rmdir()
    except OSError:
        return


def non_finite(tensors: dict[str, torch.Tensor]) -> list[str]:
    """Return the names of the tensors that hold a NaN or an infinity."""
    return sorted(name for name, tensor in tensors.items() if not bool(tensor.detach().isfinite().all()))


def adapter_tensors(model: PeftModel) -> dict[str, torch.Tensor]:
    """Return the adapter's tensors under the names that the file uses."""
    from peft import get_peft_model_state_dict

    return dict(get_peft_model_state_dict(model, save_embedding_layers=False))


def save_adapter(model: PeftModel, folder: Path, *, base: str, base_digest: str) -> None:
    """Save an adapter as a whole: into a temporary folder inside `folder`, then moved to its place.

    Raises AdapterError where the disk is full or cannot be written; nothing of the failed attempt stays behind.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as work:
            made = Path(work)
            model.save_pretrained(work, safe_serialization=True, save_embedding_layers=False)
            facts = {"base": base, "base_sha256": base_digest, "adapter_sha256": _file_digest(made / WEIGHTS)}
            (made / BASE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
            for name in (CONFIG, BASE, WEIGHTS):
                os.replace(made / name, folder / name)
    except OSError as error:
        raise AdapterError(f"cannot save the adapter in {folder}: {error.strerror or error}") from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise AdapterError(f"cannot save the adapter in {folder}: {error}") from error


def load_adapter(base: PreTrainedModel, folder: Path) -> PeftModel:
    """Put the adapter of `folder` on a freshly loaded base and return the whole.

    Raises AdapterError where the folder is missing or incomplete, where the adapter was trained on another base, where
    names or shapes do not fit exactly, and where a value is not finite.
    """
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not folder.is_dir():
        raise AdapterError(f"the adapter folder {folder} does not exist")
    absent = [name for name in (CONFIG, WEIGHTS, BASE) if not (folder / name).is_file()]
    if absent:
        raise AdapterError(f"the adapter folder {folder} has no {', no '.join(absent)}")
    facts = _read_facts(folder / BASE)
    if facts["base_sha256"] != digest(base):
        raise AdapterError(f"the adapter in {folder} was trained on another base ({facts['base']})")
    if facts["adapter_sha256"] != _file_digest(folder / WEIGHTS):
        raise AdapterError(f"{folder / WEIGHTS} is not the file that was saved (its sha256 differs)")
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"cannot read {folder / WEIGHTS}: {error}") from error
    bad = non_finite(tensors)
    if bad:
        raise AdapterError(f"the adapter in {folder} is not finite: {len(bad)} tensors, for instance {bad[0]}")
    try:
        config = LoraConfig.from_pretrained(str(folder))
        # the digest has identified the base
        config.base_model_name_or_path = None
        model = get_peft_model(base, config)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise AdapterError(f"cannot use {folder / CONFIG}: {first_line(error)}") from error
    if not _same_layout(adapter_tensors(model), tensors):
        raise AdapterError(f"the tensors in {folder / WEIGHTS} do not fit the model and {CONFIG}")
    set_peft_model_state_dict(model, tensors)
    return model


def _same_layout(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> bool:
    return {k: tuple(t.shape) for k, t in expected.items()} == {k: tuple(t.shape) for k, t in found.items()}


def _read_facts(path: Path) -> dict[str, str]:
    try:
        facts: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"cannot read {path}: {error}") from error
    names = ("base", "base_sha256", "adapter_sha256")
    if not isinstance(facts, dict) or not all(isinstance(facts.get(name), str) for name in names):
        raise AdapterError(f"{path} must hold {', '.join(names)}")
    return {name: facts[name] for name in names}


def _file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
