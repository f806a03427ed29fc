"""Learning: whether a generated training is healthy, by plain runs with no code of the guard's in them."""

from __future__ import annotations

import itertools
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from pytest_sftguard.engine.building.cpu_float16 import make_real
from pytest_sftguard.engine.generated import trainings
from pytest_sftguard.engine.generated.axes import Healthy
from pytest_sftguard.engine.surroundings.isolation import isolated
from pytest_sftguard.precision import mode_named

REPEATS = 24
"""Optimizer steps on one batch, by which its loss must fall."""
FALL = 0.97
"""The loss of one batch must fall below this share of what it was."""


def not_healthy(training: Healthy) -> str:
    """Why `training` is not a healthy one; empty if it is.

    It is trained as it is, where losses and trained numbers must be finite and none may have burst, and on one batch
    over and over, where the loss must fall.
    """
    with isolated():
        try:
            losses, model, skipped = _trained(training, training.steps, repeated=False)
        except Exception as error:
            return f"the plain training ends in an exception: {type(error).__name__}: {error}"[:300]
        if not all(map(math.isfinite, losses)):
            return "the losses of the plain training are not finite"
        if not all(bool(p.isfinite().all()) for p in model.parameters()):
            return "the trained numbers of the plain training are not finite"
        if not max(losses) <= 3 * losses[0] + 1:
            return "the loss of the plain training bursts"
        if skipped >= training.steps / 2:
            return "the loss scaler skips half of the steps of the plain training, or more"
        losses, _, _ = _trained(training, REPEATS, repeated=True)
    per_step = training.batch[1]
    first, last = statistics.mean(losses[: 2 * per_step]), statistics.mean(losses[-4 * per_step :])
    return "" if last <= FALL * first else "the loss does not fall when one batch is repeated"


def not_resumable(training: Healthy) -> str:
    """Why `training` does not go on from a checkpoint as if nothing had happened, by plain runs; empty if it does.

    Some libraries save less than they train with, or under names that they do not load: peft leaves out the encoder of
    p-tuning and AdaLoRA's importance of ranks, and refuses those ranks that a checkpoint has fewer of; transformers
    5.23 loads no head of GPT-NeoX, and torch rounds the statistics of Adafactor to the type of the parameters.
    """
    half = training.steps // 2
    with isolated(), tempfile.TemporaryDirectory() as folder:
        whole = _built(training, folder, training.steps, save_strategy="steps", save_steps=half)
        whole.train()
        resumed = _built(training, folder, training.steps)
        try:
            resumed.train(resume_from_checkpoint=str(Path(folder, f"checkpoint-{half}")))
        except Exception as error:
            return f"a plain Trainer that resumes it ends in an exception: {type(error).__name__}: {error}"[:300]
    pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    same = all(torch.equal(one, other) for one, other in pairs if one.requires_grad)
    return "" if same else "a plain Trainer that resumes it ends with other weights"


def _built(training: Healthy, folder: str, steps: int, **changes: Any) -> Any:
    """A plain Trainer of `training`."""
    mode = mode_named(training.precision)
    arguments = {
        "output_dir": folder,
        "max_steps": steps,
        "per_device_train_batch_size": training.batch[0],
        "gradient_accumulation_steps": training.batch[1],
        "seed": 0,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **mode.training_arguments,
        **changes,
    }
    trainer = trainings.built(training, dtype=mode.weights_dtype, **arguments)
    make_real(trainer)
    return trainer


def _trained(training: Healthy, steps: int, *, repeated: bool) -> tuple[list[float], Any, int]:
    """The losses of a plain training, its model, and the number of steps that a loss scaler skipped."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = _built(training, folder, steps)
        if repeated:
            trainer.train_dataset = torch.utils.data.Subset(
                trainer.train_dataset, list(range(training.batch[0])) * training.batch[1]
            )
        losses: list[Any] = []
        compute_loss = trainer.compute_loss

        def noted(*args: Any, **kwargs: Any) -> Any:
            result = compute_loss(*args, **kwargs)
            losses.append((result[0] if isinstance(result, tuple) else result).detach())
            return result

        trainer.compute_loss = noted
        scaler = trainer.accelerator.scaler
        scales = [] if scaler is None else [scaler.get_scale()]
        if scaler is not None:
            update = scaler.update

            def updated(*args: Any, **kwargs: Any) -> None:
                update(*args, **kwargs)
                scales.append(scaler.get_scale())

            scaler.update = updated
        trainer.train()
        # the scale is halved by a step that is skipped, and by no other
        skipped = sum(after < before for before, after in itertools.pairwise(scales))
        return [float(loss) for loss in losses], trainer.model, skipped
