"""Building the Trainer of a cell, and the arguments that every target receives."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_sftguard.engine.building import quantised
from pytest_sftguard.engine.building.cpu_float16 import make_real
from pytest_sftguard.engine.building.targets import Target, TargetError
from pytest_sftguard.engine.surroundings import float32
from pytest_sftguard.matrix import RunConfig
from pytest_sftguard.precision import PrecisionMode

if TYPE_CHECKING:
    from transformers import Trainer


def build(target: Target, config: RunConfig, mode: PrecisionMode, device_type: str, folder: Path) -> Trainer:
    """Build the Trainer for the cell of `config` on a device of `device_type`; it writes into `folder`.

    Raises TargetError if the target breaks its contract, and whatever its own code raises.
    """
    arguments: dict[str, Any] = {
        "model": config.model,
        "dtype": mode.weights_dtype,
        "output_dir": str(folder),
        "max_steps": config.steps,
        "per_device_train_batch_size": config.cell.per_device_train_batch_size,
        "gradient_accumulation_steps": config.cell.gradient_accumulation_steps,
        "seed": config.seed,
        "use_cpu": device_type == "cpu",
        "bf16": False,
        "fp16": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **({"tf32": False} if device_type == "cuda" else {}),
        **mode.training_arguments,
        **config.training_arguments,
    }
    if mode.quantisation and target.takes("quantization_config"):
        arguments["quantization_config"] = quantised.config_for(mode)
    float32.forget_requests()
    trainer = target.trainer(**arguments)
    for name in ("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"):
        if getattr(trainer.args, name) != arguments[name]:
            raise TargetError(
                f"target {target.path} was asked for {name}={arguments[name]}, and its Trainer has"
                f" {getattr(trainer.args, name)}: what it is given must win over its own defaults"
            )
    # a cell is one device: no DataParallel over all of them
    trainer.args._n_gpu = min(1, trainer.args.n_gpu)
    make_real(trainer)
    return trainer
