"""One run of the app, with its words for the console: train, save, reload and ask; or only reload and ask."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .adapters import adapter_tensors, load_adapter, non_finite, save_adapter
from .base import digest, label_of, load_base, load_tokenizer
from .selection import MICRO_BATCH_VARIABLE, query_hardware
from .trainers import build
from .validation import validate

if TYPE_CHECKING:
    from transformers import Trainer

Rows = Sequence[tuple[str, float]]


class RunError(RuntimeError):
    """A run whose result must not be kept; the message says why."""


def train(model: str | None, train_rows: Rows, valid_rows: Rows, output: Path, arguments: dict[str, Any]) -> None:
    """Train an adapter, save it to `output`, reload it on a fresh base, and print the score before and after.

    `arguments` are of TrainingArguments. Raises RunError where nothing may be saved, and what building and saving
    raise.
    """
    _quiet_libraries()
    trainer = build(model, "float32", train_rows, arguments)
    adapted: Any = trainer.model
    before = validate(adapted, trainer.processing_class, valid_rows, label="validating the base")
    print(f"before: {before}", flush=True)
    _train(trainer)
    base = load_base(model)
    save_adapter(adapted, output, base=label_of(model), base_digest=digest(base))
    print(f"saved: {output}", flush=True)
    asked = load_adapter(base, output).to(trainer.args.device), load_tokenizer(model), valid_rows
    after = validate(*asked, label="validating the adapter")
    print(f"after:  {after}", flush=True)


def test(model: str | None, adapter: Path, rows: Rows) -> None:
    """Load a saved adapter on its base, and print its score.

    Raises AdapterError and ModelError.
    """
    _quiet_libraries()
    tokenizer = load_tokenizer(model)
    asked = load_adapter(load_base(model), adapter).to(query_hardware().device_type), tokenizer, rows
    score = validate(*asked)
    print(score, flush=True)


def _train(trainer: Trainer) -> None:
    """Train, and raise RunError where memory runs out or the result is not sound."""
    import torch

    from .training import hold

    adapted: Any = trainer.model
    # the matrices that autocast would cast at every use are cast once; from here on the model is for training only
    if trainer.args.bf16 or trainer.args.fp16:
        hold(adapted, torch.bfloat16 if trainer.args.bf16 else torch.float16)
    try:
        trainer.train()
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"out of memory at per-device batch {trainer.args.per_device_train_batch_size}; nothing was saved; "
            f"try a smaller --micro-batch or {MICRO_BATCH_VARIABLE}"
        ) from error
    bad = non_finite(adapter_tensors(adapted))
    if bad:
        raise RunError(f"the adapter is not finite: {len(bad)} tensors, for instance {bad[0]}; nothing was saved")
    for name in ("loss", "grad_norm"):
        _refuse_non_finite(trainer, name)


def _refuse_non_finite(trainer: Trainer, name: str) -> None:
    """Raise RunError where a logged number is not finite, but for gradient norms that the loss scaler accounts for."""
    logged = [(entry["step"], float(entry[name])) for entry in trainer.state.log_history if name in entry]
    strange = [step for step, number in logged if not math.isfinite(number)]
    if name == "grad_norm" and trainer.args.fp16 and 0 < len(strange) < len(logged):
        print(f"note: the loss scaler skipped a step at {len(strange)} of {len(logged)} logged steps", flush=True)
    elif strange:
        raise RunError(
            f"{name} was not finite at {len(strange)} of {len(logged)} logged steps (first: step {strange[0]}); "
            "nothing was saved"
        )


def _quiet_libraries() -> None:
    """Silence what other libraries would say between the lines of the run."""
    from transformers.utils import logging as transformers_logging

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
