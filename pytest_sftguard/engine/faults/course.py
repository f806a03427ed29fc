"""Faults in the course of the training: the rate, the gradients on their path, the optimizer's state, the log."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import IterableDataset, Subset
from transformers import Trainer
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from pytest_sftguard.engine.faults._training import (
    at,
    factor,
    multiply_loss,
    set_scale,
    spoil_gradient,
    trainables,
    wrap,
)
from pytest_sftguard.engine.faults.fault import Fault


class LossDecreaseAssertFooled(Fault):
    """At a learning rate of 0 the loss still varies with the batches, and the last one may be below the first."""

    source = "https://github.com/huggingface/trl/issues/6702"
    injects = "sets learning_rate=0, with shuffled batches"
    reported_by = ("lr_trace", "effective_steps", "every_factor_moves")
    mechanism = "learning_rate_zero"
    arguments: ClassVar = {"learning_rate": 0.0}


class LrZeroOrWarmupLongerThanRun(Fault):
    """The run never leaves a warm-up of a hundred steps, in which an integer division keeps the learning rate at 0."""

    source = "https://github.com/huggingface/transformers/issues/33086"
    injects = "replaces the schedule with LambdaLR of min(1, step // 100)"
    reported_by = ("lr_trace", "effective_steps", "every_factor_moves")
    mechanism = "learning_rate_zero"

    def alter(self, trainer: Trainer) -> None:
        def create(create_scheduler: Any, num_training_steps: int, optimizer: Any = None) -> Any:
            trainer.lr_scheduler = LambdaLR(optimizer or trainer.optimizer, lambda step: min(1, step // 100))
            return trainer.lr_scheduler

        wrap(trainer, "create_scheduler", create)


class SkippedStepFlagLiesWithFusedAdam(Fault):
    """The loss scaler skips every step, accelerate believes that fused AdamW took it, and the schedule runs down."""

    source = "https://github.com/huggingface/accelerate/issues/4242"
    injects = "starts the GradScaler at 2**100, with optim=adamw_torch_fused and a linear schedule"
    reported_by = ("effective_steps", "lr_trace", "every_factor_moves")
    mechanism = "schedule_runs_at_skipped_steps"
    step = 1
    precision = "fp16-mixed"
    arguments: ClassVar = {"optim": "adamw_torch_fused", "lr_scheduler_type": "linear"}

    def alter(self, trainer: Trainer) -> None:
        at(trainer, "on_train_begin", lambda: set_scale(trainer, 2.0**100))


class ScheduleRunsNTimesTooFast(Fault):
    """accelerate steps a prepared scheduler once for each process, and the learning rate is 0 before the end."""

    source = "https://github.com/huggingface/accelerate/issues/1382"
    injects = "steps a linear schedule twice in each optimizer step"
    reported_by = ("lr_trace",)
    mechanism = "schedule_too_fast"
    step = 2
    arguments: ClassVar = {"lr_scheduler_type": "linear"}

    def alter(self, trainer: Trainer) -> None:
        def twice(step: Any, *args: Any, **kwargs: Any) -> None:
            step(*args, **kwargs)
            step(*args, **kwargs)

        def create(create_scheduler: Any, *args: Any, **kwargs: Any) -> Any:
            scheduler = create_scheduler(*args, **kwargs) or trainer.lr_scheduler
            wrap(scheduler, "step", twice)
            return scheduler

        wrap(trainer, "create_scheduler", create)


class LrTooHighCollapse(Fault):
    """The learning rate is far too high: the adapter saturates, and every prompt gets the same answer."""

    source = "https://github.com/artidoro/qlora/issues/78"
    injects = "sets learning_rate=0.1, twenty times what the task learns well at"
    reported_by = ("answers_beat_base", "one_batch_overfit")
    mechanism = "learning_rate_too_high"
    steps = 60
    arguments: ClassVar = {"learning_rate": 0.1}
    asks = True


class VacuousEvidence(Fault):
    """The run ends without a step and without an exception, and every check over its steps holds."""

    source = "https://github.com/huggingface/sentence-transformers/issues/3145"
    injects = "keeps one row fewer than a batch, with dataloader_drop_last=True"
    reported_by = ("evidence_complete",)
    mechanism = "no_step_taken"

    def alter(self, trainer: Trainer) -> None:
        trainer.args.dataloader_drop_last = True
        rows = trainer.train_dataset
        few = range(trainer.args.per_device_train_batch_size - 1)
        trainer.train_dataset = _NoRows() if isinstance(rows, IterableDataset) else Subset(rows, few)


class ClipWithNonfiniteNorm(Fault):
    """clip_grad_norm_ divides by an infinite norm: all gradients become 0, and the infinite one, inf * 0, NaN."""

    source = "https://github.com/pytorch/pytorch/issues/46849"
    injects = "writes inf into one entry of the gradient of one lora_B in step 3, with max_grad_norm=1"
    silent = False
    reported_by = ("gradients_finite", "weights_and_moments_finite")
    mechanism = "nonfinite_gradient_clipped"
    step = 3
    tensor = "lora_B"
    arguments: ClassVar = {"max_grad_norm": 1.0}

    def alter(self, trainer: Trainer) -> None:
        spoil_gradient(trainer, factor(trainer, "lora_B"), step=3)


class MomentumPoisonedByDiscardedStep(Fault):
    """The momentum takes in the gradient before the loss scaler finds the overflow and discards the step."""

    source = "https://github.com/deepspeedai/DeepSpeed/pull/8435"
    injects = "writes inf into a gradient of step 3 under a loss scaler, and adds it to the first moment"
    reported_by = ("weights_and_moments_finite",)
    mechanism = "optimizer_state_poisoned"
    step = 3
    tensor = "lora_B"
    precision = "fp16-mixed"

    def alter(self, trainer: Trainer) -> None:
        parameter = factor(trainer, "lora_B")

        def too_early(step: Any, *args: Any, **kwargs: Any) -> Any:
            gradient, moment = parameter.grad, trainer.optimizer.state.get(parameter, {}).get("exp_avg")
            if gradient is not None and moment is not None and not gradient.isfinite().all():
                moment.add_(gradient, alpha=0.1)
            return step(*args, **kwargs)

        at(trainer, "on_train_begin", lambda: wrap(trainer.optimizer, "step", too_early))
        spoil_gradient(trainer, parameter, step=3)


class NanCountsAsChanged(Fault):
    """A factor that becomes NaN in the last step differs from its start, and so counts as trained."""

    source = "https://github.com/huggingface/peft/issues/2448"
    injects = "writes NaN into a moment of one lora_A before the last step, or into the factor if it has no moment"
    reported_by = ("weights_and_moments_finite", "every_factor_moves")
    mechanism = "optimizer_state_poisoned"
    step = 8
    tensor = "lora_A"

    def alter(self, trainer: Trainer) -> None:
        parameter = factor(trainer, "lora_A")

        def poison() -> None:
            states = trainer.optimizer.state.get(parameter, {}).values()
            moments = [s for s in states if isinstance(s, torch.Tensor) and s.numel() > 1 and s.is_floating_point()]
            (moments[0] if moments else parameter.data).view(-1)[0] = math.nan

        at(trainer, "on_pre_optimizer_step", poison, step=trainer.args.max_steps)


class NanAdapterSavedAndServed(Fault):
    """One NaN in the trained adapter is saved, loaded and merged without complaint."""

    source = "https://github.com/facebookresearch/habitat-lab/pull/2229"
    injects = "writes NaN into one entry of the first lora_B after the last step"
    reported_by = ("weights_and_moments_finite", "round_trip")
    mechanism = "nan_in_adapter"
    tensor = "lora_B"

    def alter(self, trainer: Trainer) -> None:
        _poison_at_end(trainer)


class NanLogitsDecodeAsTokenZero(Fault):
    """Greedy decoding of NaN logits returns one id forever, and raises nothing."""

    source = "https://github.com/microsoft/onnxruntime-genai/pull/2444"
    injects = (
        "writes NaN into one entry of the first lora_B after the last step, with eager attention, which spreads it"
    )
    reported_by = ("eval_and_decode_finite", "strict_answers", "weights_and_moments_finite")
    mechanism = "nan_in_adapter"
    tensor = "lora_B"
    asks = True

    def alter(self, trainer: Trainer) -> None:
        base = trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model
        with contextlib.suppress(AttributeError, ValueError, NotImplementedError):
            base.set_attn_implementation("eager")
        _poison_at_end(trainer)


class SdpaCpuHidesNan(Fault):
    """On a CPU sdpa turns a NaN query into zeros below 16 tokens: a NaN adapter still answers."""

    source = "https://github.com/pytorch/pytorch/issues/141128"
    injects = "fills every lora_B of the query projections with NaN after the last step"
    reported_by = ("weights_and_moments_finite", "context_independence", "round_trip")
    mechanism = "nan_in_adapter"
    tensor = "lora_B"

    def alter(self, trainer: Trainer) -> None:
        def poison() -> None:
            factors = {n: p for n, p in trainables(trainer).items() if "lora_B" in n}
            queries = [p for n, p in factors.items() if any(q in n for q in ("q_proj", "query", "c_attn", "qkv"))]
            for parameter in queries or factors.values():
                parameter.data.fill_(math.nan)

        at(trainer, "on_train_end", poison)


class NanLossLoggedAsZero(Fault):
    """The log's filter shows a NaN loss as 0.0 or as a healthy mean, and scripts clean its gradients."""

    source = "https://github.com/huggingface/trl/issues/6702"
    injects = "multiplies the loss of step 3 by NaN and cleans the gradients with nan_to_num, logging_nan_inf_filter on"
    reported_by = ("log_honest", "raw_loss_finite", "gradients_finite")
    mechanism = "log_laundered"
    step = 3

    def alter(self, trainer: Trainer) -> None:
        trainer.args.logging_nan_inf_filter = True

        def clean() -> None:
            for parameter in trainables(trainer).values():
                if parameter.grad is not None:
                    parameter.grad.nan_to_num_(0.0, 0.0, 0.0)

        multiply_loss(trainer, lambda: math.nan, step=3)
        at(trainer, "on_pre_optimizer_step", clean)


class NanBestMetric(Fault):
    """Control: the Trainer starts from infinity, so that a metric that is NaN at first does not block a later best."""

    source = "https://github.com/Bjarten/early-stopping-pytorch/pull/28"
    injects = "returns NaN in the first evaluation for the metric that chooses the best checkpoint: healthy now"

    def alter(self, trainer: Trainer) -> None:
        if trainer.eval_dataset is None:
            trainer.eval_dataset = list(itertools.islice(iter(trainer.train_dataset), 8))
        args = trainer.args
        args.eval_strategy, args.eval_steps = IntervalStrategy.STEPS, 2
        args.save_strategy, args.save_steps = SaveStrategy.STEPS, 2
        args.metric_for_best_model, args.greater_is_better, args.load_best_model_at_end = "eval_score", True, False
        scores = itertools.chain([math.nan], itertools.count(1.0))

        def scored(evaluation_loop: Any, *args: Any, **kwargs: Any) -> Any:
            output = evaluation_loop(*args, **kwargs)
            output.metrics["eval_score"] = next(scores)
            return output

        wrap(trainer, "evaluation_loop", scored)


def _poison_at_end(trainer: Trainer) -> None:
    """Write NaN into one entry of the first `lora_B` after the last step."""
    at(trainer, "on_train_end", lambda: factor(trainer, "lora_B").data.view(-1)[:1].fill_(math.nan))


class _NoRows(IterableDataset[Any]):
    """A stream without a row."""

    def __iter__(self) -> Iterator[Any]:
        return iter(())
