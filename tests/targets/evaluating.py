"""The sums, evaluated while they are learned: with the best checkpoint kept, in health and with one thing wrong."""

from __future__ import annotations

import shutil
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from pytest_sftguard.engine.models import sums, tiny
from tests.targets import tasks

_BEST = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "load_best_model_at_end": True,
}


def best(**arguments: Any) -> Trainer:
    """The checkpoint of the lowest evaluation loss is loaded at the end, and only the last others are kept."""
    trainer = sums.build_trainer(**arguments | _BEST | {"save_total_limit": 2})
    for module in trainer.model.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = torch.nn.Dropout(0.1)
    trainer.model.peft_config["default"].lora_dropout = 0.1
    return trainer


def best_by_accuracy(**arguments: Any) -> Trainer:
    """The same by a metric of which more is better."""
    return _with_metric(best(**arguments | {"metric_for_best_model": "accuracy"}), "accuracy", lambda loss: -loss)


def overfitted(**arguments: Any) -> Trainer:
    """A rate that grows until the loss rises again, so that the best checkpoint is not the last."""
    return best(**arguments | {"learning_rate": 0.3, "lr_scheduler_type": "constant"})


def whole(*, model: str | None = None, dtype: str = "float32", **arguments: Any) -> Trainer:
    """Every weight of the model trains, until the loss rises again; a checkpoint holds them all."""
    base = tiny.causal_base(model, getattr(torch, dtype), tiny.llama(64, 0.1))
    args = TrainingArguments(**arguments | _BEST | {"learning_rate": 0.1, "lr_scheduler_type": "constant"})
    set_seed(args.seed)
    rows = sums.rows(sums.tokenizer())
    return Trainer(model=base, args=args, train_dataset=rows, eval_dataset=rows[:8], data_collator=tiny.collate)


def rewarded(**arguments: Any) -> Trainer:
    """An evaluation set whose batches are lists of prompts."""
    trainer = tasks.grpo(**arguments)
    trainer.eval_dataset = trainer.train_dataset
    return trainer


def best_by_step_alone(**arguments: Any) -> Trainer:
    """No checkpoint is chosen."""
    return sums.build_trainer(**arguments | {"eval_strategy": "steps", "eval_steps": 2})


def worst(**arguments: Any) -> Trainer:
    """Wrong: `greater_is_better` for a loss."""
    return best(**arguments | {"metric_for_best_model": "loss", "greater_is_better": True})


def worst_perplexity(**arguments: Any) -> Trainer:
    """Wrong: a perplexity, for which `greater_is_better` was not set, and whose default is True."""
    return _with_metric(
        best(**arguments | {"metric_for_best_model": "perplexity"}), "perplexity", lambda loss: loss * 2
    )


def not_loaded(**arguments: Any) -> Trainer:
    """Wrong: the best checkpoint does not arrive in the model."""
    trainer = overfitted(**arguments)
    trainer._load_best_model = lambda: None
    return trainer


def whole_not_loaded(**arguments: Any) -> Trainer:
    """Wrong: the same where every weight trains."""
    trainer = whole(**arguments)
    trainer._load_best_model = lambda: None
    return trainer


def rotated_away(**arguments: Any) -> Trainer:
    """Wrong: somebody's clean-up removes the best checkpoint before the end."""
    trainer = overfitted(**arguments)

    class CleanUp(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == args.max_steps and state.best_model_checkpoint:
                shutil.rmtree(state.best_model_checkpoint)
                control.should_save = False

    trainer.add_callback(CleanUp())
    trainer._load_best_model = lambda: None
    return trainer


def evaluated_in_training_mode(**arguments: Any) -> Trainer:
    """Wrong: an evaluation of one's own that forgets `model.eval()`."""
    trainer = best(**arguments)
    original = trainer.prediction_step

    def prediction_step(model: Any, *rest: Any, **options: Any) -> Any:
        model.train()
        return original(model, *rest, **options)

    trainer.prediction_step = prediction_step
    return trainer


def evaluated_with_a_memory(**arguments: Any) -> Trainer:
    """Wrong: what one evaluation leaves behind is added to the next."""
    trainer = best(**arguments)
    original, calls = trainer.compute_loss, [0]

    def compute_loss(model: Any, *rest: Any, **options: Any) -> Any:
        loss = original(model, *rest, **options)
        if model.training:
            return loss
        calls[0] += 1
        return (loss[0] + 0.01 * calls[0], *loss[1:]) if isinstance(loss, tuple) else loss + 0.01 * calls[0]

    trainer.compute_loss = compute_loss
    return trainer


def _with_metric(trainer: Trainer, name: str, value: Any) -> Trainer:
    """Let the evaluations have another metric, a function of their loss."""
    original = trainer.evaluation_loop

    def evaluation_loop(*args: Any, **options: Any) -> Any:
        found = original(*args, **options)
        found.metrics[f"eval_{name}"] = value(found.metrics["eval_loss"])
        return found

    trainer.evaluation_loop = evaluation_loop
    return trainer
