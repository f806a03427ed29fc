"""Faults that only another run of the same training shows: batch splits, repeats, interruptions, replicas."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import Trainer

from pytest_sftguard.engine.building.cpu_float16 import make_real
from pytest_sftguard.engine.faults._collating import IGNORED, collating
from pytest_sftguard.engine.faults._training import largest_scale, multiply_loss, set_scale, wrap
from pytest_sftguard.engine.faults.fault import Fault


class AccumulationMeanOfMeans(Fault):
    """Gradient accumulation averages the means of the micro-batches instead of the losses of their tokens."""

    source = "https://github.com/huggingface/transformers/pull/34191"
    injects = "ignores num_items_in_batch and divides by the number of micro-batches, as before transformers 4.46"
    reported_by = ("batch_split_equivalence",)
    mechanism = "accumulation_mean_of_means"
    step = 1
    batch = (2, 4)

    def alter(self, trainer: Trainer) -> None:
        def forgetful(compute_loss: Any, *args: Any, num_items_in_batch: Any = None, **kwargs: Any) -> Any:
            return compute_loss(*args, **kwargs)

        _make_lengths_uneven(trainer)
        wrap(trainer, "compute_loss", forgetful)
        trainer.loss_is_scaled_for_ga = False


class NormaliserCountsUnshiftedLabels(Fault):
    """The loss is divided by the number of labels before the shift: one too many in a row labelled from the start."""

    source = "https://github.com/huggingface/transformers/pull/46204"
    injects = "labels the first token of each row, and counts num_items_in_batch as before May 2026, over all labels"
    reported_by = ("batch_split_equivalence",)
    mechanism = "loss_divided_by_unshifted_labels"
    step = 1

    def alter(self, trainer: Trainer) -> None:
        collating(trainer, lambda batch: batch["labels"][:, 0].copy_(batch["input_ids"][:, 0]))
        trainer._loss_shifts_labels = False


class TokenAverageAcrossReplicas(Fault):
    """Each process divides by its own labels: what is learned depends on how the tokens fall on the ranks."""

    source = "https://github.com/huggingface/transformers/issues/34242"
    injects = "sets average_tokens_across_devices=False, the Trainer's default until July 2025"
    reported_by = ("replica_equivalence",)
    mechanism = "replicas_average_means"
    step = 1
    batch = (8, 1)
    arguments: ClassVar = {"average_tokens_across_devices": False}
    looks = ("replicas",)

    def alter(self, trainer: Trainer) -> None:
        _make_lengths_uneven(trainer)


class LossScaledByMesh(Fault):
    """The factor that makes up for averaging over ranks also counts ranks that share their data."""

    source = "https://github.com/huggingface/transformers/issues/39648"
    injects = "multiplies the loss by accelerator.num_processes once more"
    reported_by = ("replica_equivalence",)
    mechanism = "replicas_average_means"
    step = 1
    batch = (8, 1)
    looks = ("replicas",)

    def alter(self, trainer: Trainer) -> None:
        multiply_loss(trainer, lambda: trainer.accelerator.num_processes)


class ResumeLosesScaler(Fault):
    """A checkpoint lost its loss scale: the resumed run starts at the first scale again, and skips steps anew."""

    source = "https://github.com/lm-sys/FastChat/pull/1280"
    injects = "does not save scaler.pt, and starts at four times the largest scale that fits"
    reported_by = ("resume_equivalence",)
    mechanism = "resume_loses_scale"
    step = 5
    precision = "fp16-mixed"
    looks = ("resumed",)

    def alter(self, trainer: Trainer) -> None:
        make_real(trainer)
        set_scale(trainer, 4 * largest_scale(trainer))
        trainer._save_scaler = lambda folder: None


class ResumeLosesOptimizerOrSchedule(Fault):
    """A checkpoint lost its schedule: the Trainer resumes without it and without the optimizer's state, silently."""

    source = "https://github.com/huggingface/peft/issues/859"
    injects = "deletes scheduler.pt from every checkpoint"
    reported_by = ("resume_equivalence",)
    mechanism = "resume_loses_state"
    step = 5
    looks = ("resumed",)

    def alter(self, trainer: Trainer) -> None:
        def save(original: Any, folder: str) -> None:
            original(folder)
            (Path(folder) / "scheduler.pt").unlink(missing_ok=True)

        wrap(trainer, "_save_optimizer_and_scheduler", save)


class OomRetryKeepsHalfTrainedWeights(Fault):
    """After running out of memory the Trainer starts over with a smaller batch, and with half-trained weights."""

    source = "https://github.com/sentence-transformers/sentence-transformers/issues/3145"
    injects = "sets auto_find_batch_size=True, and raises torch.OutOfMemoryError in the third compute_loss"
    reported_by = ("evidence_complete", "rerun_bit_equal")
    mechanism = "retry_keeps_trained_weights"
    batch = (8, 1)
    arguments: ClassVar = {"auto_find_batch_size": True}
    looks = ("rerun",)

    def __init__(self) -> None:
        # Once in a process: another program took the memory for a moment
        self.calls = itertools.count(1)

    def alter(self, trainer: Trainer) -> None:
        def crowded(compute_loss: Any, *args: Any, **kwargs: Any) -> Any:
            if next(self.calls) == 3:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return compute_loss(*args, **kwargs)

        wrap(trainer, "compute_loss", crowded)


class BatchShapeChangesBits(Fault):
    """Control: in low precision the bits of a loss depend on the shape of the batch, which is healthy."""

    source = "https://thinkingmachines.ai/blog/defeating-nondeterminism-in-llm-inference/"
    injects = "changes nothing: compares a healthy bfloat16 run with another batch split, float32 and itself"
    precision = "bf16-mixed"
    batch = (4, 2)
    looks = ("rerun",)


def _make_lengths_uneven(trainer: Trainer) -> None:
    """Append a second row to every other one if all rows have as many labels: then no wrong mean over them shows."""
    rows = trainer.train_dataset
    plain = isinstance(rows, list) and all(isinstance(r, dict) and {"input_ids", "labels"} <= r.keys() for r in rows)
    if plain and len({sum(label != IGNORED for label in r["labels"]) for r in rows}) == 1:
        pairs = zip(rows, rows[1:] + rows[:1], strict=True)
        trainer.train_dataset = [_joined(*pair) if i % 2 else pair[0] for i, pair in enumerate(pairs)]


def _joined(row: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Two rows in one, with one BOS."""
    skipped = 1 if row["input_ids"][:1] == after["input_ids"][:1] else 0
    joined = {key: [*row[key], *after[key][skipped:]] for key in ("input_ids", "labels")}
    mask = {"attention_mask": [1] * len(joined["input_ids"])} if "attention_mask" in row else {}
    return joined | mask
