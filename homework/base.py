"""The base model: the embedded one, one known by name, a folder, or a hub id; loaded completely or not at all."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from .sources import ModelError, located

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = Path(__file__).parent / "model"
"""The folder of the model that ships with the app."""
DTYPES = ("float32", "bfloat16", "float16")


def name_of(model: str | None) -> str:
    """Return the name, folder or hub id that `model` stands for; None is the embedded model."""
    return str(EMBEDDED) if model is None else str(model)


def is_embedded(model: str | None) -> bool:
    """Say whether `model` is the one that ships with the app."""
    return model is None or (Path(model).is_dir() and Path(model).resolve() == EMBEDDED.resolve())


def label_of(model: str | None) -> str:
    """Return the name that an adapter's files give to its base; never the path of this checkout."""
    return "homework/model" if is_embedded(model) else name_of(model)


def _check_folder(name: str) -> None:
    folder = Path(name)
    if not folder.exists():
        if folder.is_absolute() or name.startswith((".", "~")) or len(folder.parts) > 2:
            raise ModelError(f"the model folder {name} does not exist")
        return
    if not folder.is_dir():
        raise ModelError(f"the model {name} is a file; expected a folder or a hub id")
    if not (folder / "config.json").is_file():
        raise ModelError(f"the model folder {name} has no config.json")
    if not any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        raise ModelError(f"the model folder {name} has no tokenizer")
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"the model folder {name} has no safetensors weights")


def _shown(name: str) -> str:
    return name if Path(name).exists() else f"{name} (no folder here, so taken as a hub id)"


def load_tokenizer(model: str | None) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a base, with a padding token. Raises ModelError."""
    from transformers import AutoTokenizer

    name = located(name_of(model))
    _check_folder(name)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name)
    # from_pretrained raises errors of many types for a broken folder
    except Exception as error:
        raise ModelError(f"cannot load the tokenizer of {_shown(name)}: {first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer of {name} has no end-of-sequence token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(model: str | None, dtype: str = "float32") -> PreTrainedModel:
    """Return a base model in `dtype`, every weight read from its file. Raises ModelError."""
    import torch
    from transformers import AutoModelForCausalLM

    if dtype not in DTYPES:
        raise ModelError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    name = located(name_of(model))
    _check_folder(name)
    try:
        loaded, report = AutoModelForCausalLM.from_pretrained(
            name, dtype=getattr(torch, dtype), output_loading_info=True, use_safetensors=True
        )
    # from_pretrained raises errors of many types for a broken folder
    except Exception as error:
        raise ModelError(f"cannot load the model {_shown(name)}: {first_line(error)}") from error
    absent = sorted(str(key) for key in report.get("missing_keys", ()))
    if absent:
        raise ModelError(f"the weights of {name} lack {len(absent)} tensors, for instance {absent[0]}")
    result: PreTrainedModel = loaded
    return result


def digest(model: PreTrainedModel) -> str:
    """Return the sha256 over the names, shapes and float32 values of a base model's parameters."""
    import torch

    total = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        total.update(f"{name} {tuple(parameter.shape)}\n".encode())
        total.update(parameter.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return total.hexdigest()


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type where it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]
