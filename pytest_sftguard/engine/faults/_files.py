"""What goes wrong between a Trainer and the files that it saves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Trainer


def after_saving(trainer: Trainer, change: Callable[[Path], None]) -> Trainer:
    """Have `change` act on the folder whenever `trainer` has saved its model."""
    save = trainer.save_model

    def saved(output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        save(output_dir, *args, **kwargs)
        change(Path(output_dir or trainer.args.output_dir))

    trainer.save_model = saved
    return trainer


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Put `change` of the tensors into each adapter file below `folder`."""
    from safetensors.torch import load_file, save_file

    for path in folder.rglob("adapter_model.safetensors"):
        save_file(change(load_file(path)), path)


def configure(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Put `change` of the settings into each adapter configuration below `folder`."""
    for path in folder.rglob("adapter_config.json"):
        path.write_text(json.dumps(change(json.loads(path.read_text(encoding="utf-8")))), encoding="utf-8")
