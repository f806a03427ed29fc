"""Targets for the tests: the tiny built-in one, in health and with one thing wrong.

Each fault is made as a user would make it, in the target; the guard is told nothing.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from pytest_sftguard.engine.building.cpu_float16 import make_real
from pytest_sftguard.engine.faults import fault_named
from pytest_sftguard.engine.models import tiny

TINY = "pytest_sftguard.engine.models.tiny:build_trainer"


def half_precision_adapters(**arguments: Any) -> Trainer:
    """The founding bug: the adapter in the base's float16, and an AdamW that computes in its parameters' type."""
    return to_float16(tiny.build_trainer(**{"optim": "adamw_torch", "learning_rate": 1e-2} | arguments))


def to_float16(trainer: Trainer) -> Trainer:
    """Cast what `autocast_adapter_dtype=False` would have left in the type of a float16 base."""
    for parameter in _trainable(trainer):
        parameter.data = parameter.data.half()
    return trainer


def fused_half_precision_adapters(**arguments: Any) -> Trainer:
    """float16 moments under fused Adam: a log without a blemish, and updates of hundreds of learning rates."""
    return to_float16(tiny.build_trainer(**{"optim": "adamw_torch_fused", "learning_rate": 1e-2} | arguments))


def ignores_precision(**arguments: Any) -> Trainer:
    """A target that does not pass on the precision it was asked for."""
    return tiny.build_trainer(**arguments | {"fp16": False, "bf16": False})


def ignores_dtype(**arguments: Any) -> Trainer:
    """A target that loads its base in the checkpoint's type, bfloat16, whatever it was asked for."""
    return tiny.build_trainer(**arguments | {"dtype": "bfloat16"})


def ignores_batch(**arguments: Any) -> Trainer:
    """A target whose own batch size wins."""
    return tiny.build_trainer(**arguments | {"per_device_train_batch_size": 4})


def learning_rate_zero(**arguments: Any) -> Trainer:
    """A schedule that never leaves 0."""
    return tiny.build_trainer(**arguments | {"learning_rate": 0.0})


def warm_up(**arguments: Any) -> Trainer:
    """A linear warm-up, which starts at learning rate 0: healthy."""
    return tiny.build_trainer(**arguments | {"lr_scheduler_type": "linear", "warmup_steps": 2})


def labels_masked(**arguments: Any) -> Trainer:
    """Every label is -100."""
    trainer = tiny.build_trainer(**arguments)
    for row in trainer.train_dataset:
        row["labels"] = [-100] * len(row["labels"])
    return trainer


def base_not_frozen(**arguments: Any) -> Trainer:
    """The base trains along, and the adapter file will not hold what it learns."""
    trainer = tiny.build_trainer(**arguments)
    trainer.model.requires_grad_(True)
    return trainer


def optimizer_of_the_base(**arguments: Any) -> Trainer:
    """An optimizer that was made before the LoRA wrap owns none of the adapter's parameters."""
    trainer = tiny.build_trainer(**arguments)
    frozen = [p for p in trainer.model.parameters() if not p.requires_grad]
    trainer.optimizer = torch.optim.AdamW(frozen, lr=1e-3)
    return trainer


def frozen_under_checkpointing(**arguments: Any) -> Trainer:
    """A frozen adapter under gradient checkpointing: backward works, nothing trains, nothing warns."""
    trainer = tiny.build_trainer(**arguments | {"gradient_checkpointing": True})
    trainer.model.requires_grad_(False)
    trainer.model.enable_input_require_grads()
    return trainer


def loss_is_a_number(**arguments: Any) -> Trainer:
    """A compute_loss that returns a number, which has no gradient."""
    trainer = tiny.build_trainer(**arguments)
    original = trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: original(*args, **kwargs).item()
    return trainer


def third_loss_infinite(**arguments: Any) -> Trainer:
    """One micro-batch with an infinite loss, in the third step of a cell without accumulation."""
    trainer = tiny.build_trainer(**arguments)
    original, calls = trainer.compute_loss, [0]

    def compute_loss(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        loss = original(*args, **kwargs)
        return loss * math.inf if calls[0] == 3 else loss

    trainer.compute_loss = compute_loss
    return trainer


def loss_through_numpy(**arguments: Any) -> Trainer:
    """A loss that is looked at through numpy: healthy, and nothing that a tensor without numbers could follow."""
    trainer = tiny.build_trainer(**arguments)
    original = trainer.compute_loss

    def compute_loss(*args: Any, **kwargs: Any) -> Any:
        loss = original(*args, **kwargs)
        assert loss.detach().numpy().shape == ()
        return loss

    trainer.compute_loss = compute_loss
    return trainer


def gradients_zeroed_by_a_callback(**arguments: Any) -> Trainer:
    """NaN gradients, which a callback turns into zeros before the optimizer sees them."""
    trainer = tiny.build_trainer(**arguments)
    parameter = _trainable(trainer)[0]
    parameter.register_hook(lambda gradient: gradient * math.nan)
    trainer.add_callback(_ZeroGradients(trainer))
    return trainer


def activations_beyond_float16(**arguments: Any) -> Trainer:
    """An MLP whose product exceeds 65504: fine in float32 and bfloat16, infinite in float16."""
    trainer = tiny.build_trainer(**arguments)
    _scale_mlp(trainer, 3e4)
    return trainer


def scaler_skips_three(**arguments: Any) -> Trainer:
    """Mixed float16 whose loss scale starts three halvings too high: three skipped steps, and all is well."""
    scale = 8 * first_loss_scale_that_fits()
    trainer = one_batch(tiny.build_trainer(**arguments))
    make_real(trainer)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return trainer


def one_batch(trainer: Trainer) -> Trainer:
    """Every step sees the same eight rows."""
    trainer.train_dataset = trainer.train_dataset[:8]
    return trainer


def first_loss_scale_that_fits() -> float:
    """A loss scale under which the tiny model's float16 gradients do not overflow, and under twice of which they do.

    Both with 19 % to spare, as rows in another order round otherwise.
    """
    arguments = {"output_dir": "unused", "use_cpu": True, "per_device_train_batch_size": 8, "report_to": "none"}
    trainer = one_batch(tiny.build_trainer(**arguments))
    batch = next(iter(trainer.get_train_dataloader()))
    scale = 2.0**40
    while scale > 1:
        trainer.model.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = trainer.model(**batch).loss
        (loss * scale).backward()
        if all(p.grad.isfinite().all() for p in _trainable(trainer)):
            return scale / 2**0.25
        scale /= 2**0.5
    raise AssertionError("the tiny model overflows float16 at any scale")


def empty_adapter_file(**arguments: Any) -> Trainer:
    """save_model that writes an adapter without tensors."""
    trainer = tiny.build_trainer(**arguments)
    original = trainer.save_model

    def save_model(folder: str, *args: Any, **kwargs: Any) -> None:
        from pathlib import Path

        from safetensors.torch import save_file

        original(folder, *args, **kwargs)
        save_file({}, Path(folder) / "adapter_model.safetensors")

    trainer.save_model = save_model
    return trainer


def another_base_each_time(**arguments: Any) -> Trainer:
    """A base that is drawn anew at every call: the reloaded adapter sits on weights that it never saw."""
    trainer = tiny.build_trainer(**arguments)
    generator = torch.Generator().manual_seed(torch.randint(0, 2**31, (), generator=_FRESH).item())
    for name, parameter in trainer.model.named_parameters():
        if "lora_" not in name:
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return trainer


def raises_in_training(**arguments: Any) -> Trainer:
    """A data collator that raises at the third micro-batch, which is fetched while the second is computed."""
    trainer = tiny.build_trainer(**arguments)
    original, calls = trainer.data_collator, [0]

    def collate(features: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise RuntimeError("row 7 is broken")
        return original(features)

    trainer.data_collator = collate
    return trainer


def unknown_token_id(**arguments: Any) -> Trainer:
    """A data collator whose third micro-batch holds an id that the embedding has no row for."""
    return fault_named("token-id-out-of-range").trainer(tiny.build_trainer, **arguments)


def backward_by_hand(**arguments: Any) -> Trainer:
    """A Trainer that does not call the accelerator for its backward pass: healthy."""
    trainer = tiny.build_trainer(**arguments)

    def training_step(model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        model.train()
        loss = trainer.compute_loss(model, trainer._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
        loss.backward()
        return loss.detach()

    trainer.training_step = training_step
    return trainer


def dropped_wrapper(**arguments: Any) -> Trainer:
    """A Trainer of the model that get_peft_model was given, not of what it returned."""
    trainer = tiny.build_trainer(**arguments)
    trainer.model = trainer.model.get_base_model()
    return trainer


def no_trainer(**arguments: Any) -> Any:
    """Something else than a Trainer."""
    return dict(arguments)


def narrow(*, output_dir: str) -> Any:
    """A function that takes too few keywords."""
    return output_dir


class _ZeroGradients(TrainerCallback):
    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        for parameter in _trainable(self.trainer):
            parameter.grad.nan_to_num_(0.0)


_FRESH = torch.Generator().manual_seed(3)


def _trainable(trainer: Trainer) -> list[nn.Parameter]:
    return [p for p in trainer.model.parameters() if p.requires_grad]


def _scale_mlp(trainer: Trainer, factor: float) -> None:
    layer = next(m for m in trainer.model.modules() if hasattr(m, "up_proj") and hasattr(m, "down_proj"))
    with torch.no_grad():
        layer.up_proj.base_layer.weight.mul_(factor)
        layer.down_proj.base_layer.weight.mul_(factor)


def homework_half_precision_adapters(**arguments: Any) -> Trainer:
    """The founding bug on the embedded model of this repository."""
    from homework.sft import build_trainer

    return to_float16(build_trainer(**{"optim": "adamw_torch"} | arguments))
