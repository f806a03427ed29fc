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
from .task.answers import OPEN_TAG, format_number
from .trainers import build
from .validation import Score, validate

if TYPE_CHECKING:
    from transformers import Trainer

Rows = Sequence[tuple[str, float]]

HARDLY_ANY = 0.05
"""Up to this answer rate, a model does not know the answer format."""


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
    steps = trainer.state.global_step
    asked = load_adapter(base, output).to(trainer.args.device), load_tokenizer(model), valid_rows
    after = validate(*asked, label="validating the adapter")
    print(f"after:  {after}", flush=True)
    _explain(after, *asked, f"{steps} {'step is' if steps == 1 else 'steps are'} too few to learn the answer format")


def test(model: str | None, adapter: Path, rows: Rows, wrong: int) -> None:
    """Load a saved adapter on its base, and print its score and the first `wrong` of its wrong answers.

    Raises AdapterError and ModelError.
    """
    _quiet_libraries()
    tokenizer = load_tokenizer(model)
    asked = load_adapter(load_base(model), adapter).to(query_hardware().device_type), tokenizer, rows
    score = validate(*asked)
    print(score, flush=True)
    _explain(score, *asked, "the adapter has not learned the answer format")
    mistakes = [answer for answer in score.answers if not answer.right]
    for answer in mistakes[:wrong]:
        print(f"  {answer.question!r} -> {answer.text!r} (right: {format_number(answer.expected)})")


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


def _explain(score: Score, adapted: Any, tokenizer: Any, rows: Rows, cause: str) -> None:
    """Where hardly a question was answered, ask again with the opening tag given, and print what that shows."""
    if score.answer_rate > HARDLY_ANY:
        return
    seeded = validate(adapted, tokenizer, rows, prefix=OPEN_TAG, label=f"validating with {OPEN_TAG} given")
    if seeded.answer_rate > HARDLY_ANY:
        print(f'note: {cause}; with "{OPEN_TAG}" given, {seeded}', flush=True)
    else:
        print(f'note: hardly a question is answered, even with "{OPEN_TAG}" given: {seeded}', flush=True)


def _quiet_libraries() -> None:
    """Silence what other libraries would say between the lines of the run."""
    from transformers.utils import logging as transformers_logging

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
