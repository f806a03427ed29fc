"""Trainings with one thing wrong, as a user's code would have it: what must never come out passed.

Each function is a target of its own. Those that act on a step act on the fourth, unless they say otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import Linear
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback

from pytest_sftguard.engine.adapter.adapters import lora_layers
from tests.targets.healthy import built, with_kernel

STEP = 4


class At(TrainerCallback):
    """Calls a function at one of the Trainer's events, on one step or on all."""

    def __init__(self, event: str, act: Callable[..., Any], step: int | None = STEP) -> None:
        def handler(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if step is None or state.global_step == (step if event in ("on_step_end", "on_log") else step - 1):
                act(control) if event == "on_step_end" else act()

        setattr(self, event, handler)


def on(trainer: Trainer, event: str, act: Callable[..., Any], step: int | None = STEP) -> Trainer:
    """Have the Trainer call `act` at `event` of `step` (None: of every one)."""
    trainer.add_callback(At(event, act, step))
    return trainer


def parameters(trainer: Trainer, part: str = "lora_") -> list[torch.nn.Parameter]:
    """The trainable tensors with `part` in their names."""
    return [p for n, p in trainer.model.named_parameters() if part in n and p.requires_grad]


def nan_in_one_gradient(**arguments: Any) -> Trainer:
    """One NaN in one gradient of the fourth step's only micro-batch, which a callback cleans before clipping."""
    trainer = built(arguments)
    target, calls = parameters(trainer)[9], [0]

    def hook(gradient: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == STEP:
            gradient = gradient.clone()
            gradient.view(-1)[5] = math.nan
        return gradient

    target.register_hook(hook)
    return on(trainer, "on_pre_optimizer_step", lambda: [p.grad.nan_to_num_(0.0) for p in parameters(trainer)], None)


def nan_in_one_gradient_kept(**arguments: Any) -> Trainer:
    """The same, and nobody cleans it."""
    trainer = nan_in_one_gradient(**arguments)
    trainer.pop_callback(At)
    return trainer


def infinite_moment(**arguments: Any) -> Trainer:
    """Infinity in one second moment: its element stands still from then on, and everything is finite to look at."""
    trainer = built(arguments)

    def poison(control: Any) -> None:
        trainer.optimizer.state[parameters(trainer)[3]]["exp_avg_sq"].view(-1)[2] = math.inf

    return on(trainer, "on_step_end", poison, STEP - 1)


def factor_frozen_midway(**arguments: Any) -> Trainer:
    """One lora_B stops to require gradients before the fourth step."""
    trainer = built(arguments)
    return on(trainer, "on_step_begin", lambda: parameters(trainer, "lora_B")[2].requires_grad_(False))


def layer_missing_from_the_optimizer(**arguments: Any) -> Trainer:
    """A filter by name that loses one layer."""
    trainer = built(arguments)
    owned = [p for n, p in trainer.model.named_parameters() if p.requires_grad and "layers.1.mlp.up_proj" not in n]
    trainer.optimizer = torch.optim.AdamW(owned, lr=1e-3)
    return trainer


def update_undone(**arguments: Any) -> Trainer:
    """A callback restores the weights of before the fourth step, after it."""
    trainer = built(arguments)
    kept: list[torch.Tensor] = []
    on(trainer, "on_step_begin", lambda: kept.extend(p.detach().clone() for p in parameters(trainer)))
    return on(trainer, "on_step_end", lambda control: _write(parameters(trainer), kept))


def every_update_undone(**arguments: Any) -> Trainer:
    """A 'best weights' callback restores the start after every step."""
    trainer = built(arguments)
    kept = [p.detach().clone() for p in parameters(trainer)]
    return on(trainer, "on_step_end", lambda control: _write(parameters(trainer), kept), None)


def average_written_back(**arguments: Any) -> Trainer:
    """An exponential moving average that overwrites the weights after every step."""
    trainer = built(arguments)
    average = [p.detach().clone() for p in parameters(trainer)]

    def blend(control: Any) -> None:
        torch._foreach_lerp_(average, [p.detach() for p in parameters(trainer)], 0.001)
        _write(parameters(trainer), average)

    return on(trainer, "on_step_end", blend, None)


def one_bit_in_a_base_weight(**arguments: Any) -> Trainer:
    """One bit of one frozen weight flips in the fourth step."""
    trainer = built(arguments)
    weight = next(p for n, p in trainer.model.named_parameters() if "layers.1.mlp.down_proj.base_layer" in n)
    return on(trainer, "on_step_end", lambda control: _flip(weight))


def one_bit_in_a_buffer(**arguments: Any) -> Trainer:
    """One bit of the rotary frequencies flips in the fourth step."""
    trainer = built(arguments)
    return on(trainer, "on_step_end", lambda control: _flip(_rotary(trainer)))


def base_changed_and_restored(**arguments: Any) -> Trainer:
    """A callback doubles a base weight in the second step, and puts it back after the last."""
    trainer = built(arguments)
    weight = next(p for n, p in trainer.model.named_parameters() if "layers.1.mlp.down_proj.base_layer" in n)
    on(trainer, "on_step_end", lambda control: weight.data.mul_(2), 2)
    trainer.add_callback(At("on_train_end", lambda: weight.data.div_(2), None))
    return trainer


def loss_laundered(**arguments: Any) -> Trainer:
    """nan_to_num on a loss that is NaN in the fourth step, in compute_loss: the gradient is zero there."""

    class Own(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            return torch.nan_to_num(loss * math.nan) if self.state.global_step == STEP - 1 else loss

    return built(arguments, trainer_class=Own)


def returned_loss_laundered(**arguments: Any) -> Trainer:
    """A loss that is NaN in the fourth step, and nan_to_num on what training_step returns."""

    class Own(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            return loss * math.nan if self.state.global_step == STEP - 1 else loss

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            return torch.nan_to_num(super().training_step(*args, **kwargs))

    return built(arguments, trainer_class=Own)


def log_laundered(**arguments: Any) -> Trainer:
    """A loss that is NaN, gradients that are zeroed, and a log that says 0.5."""

    class Own(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            return loss * math.nan if self.state.global_step == STEP - 1 else loss

        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            super().log({k: 0.5 if k in ("loss", "grad_norm") else v for k, v in logs.items()}, *args, **kwargs)

    trainer = built(arguments, trainer_class=Own)
    return on(trainer, "on_pre_optimizer_step", lambda: [p.grad.nan_to_num_() for p in parameters(trainer)], None)


def constant_loss(**arguments: Any) -> Trainer:
    """A loss that does not depend on the adapter, but still has a graph."""

    class Own(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs) * 0.0 + 1.0

    return built(arguments, trainer_class=Own)


def two_steps_in_one(**arguments: Any) -> Trainer:
    """A callback steps the optimizer a second time."""
    trainer = built(arguments)
    return on(trainer, "on_optimizer_step", lambda: trainer.optimizer.step(), None)


def gradients_never_cleared(**arguments: Any) -> Trainer:
    """zero_grad does nothing, so that every step sees the sum of all before."""
    trainer = built(arguments)
    trainer.model.zero_grad = lambda *args, **kwargs: None
    trainer.optimizer = torch.optim.AdamW(parameters(trainer), lr=1e-3)
    trainer.optimizer.zero_grad = lambda *args, **kwargs: None
    return trainer


def scheduler_steps_twice(**arguments: Any) -> Trainer:
    """A callback steps the scheduler too, so that half of the run has a learning rate of 0."""
    trainer = built(arguments | {"lr_scheduler_type": "linear"})
    return on(trainer, "on_step_end", lambda control: trainer.lr_scheduler.step(), None)


def saved_too_early(**arguments: Any) -> Trainer:
    """save_model copies the checkpoint of the second step."""
    trainer = built(arguments)
    early = Path(arguments["output_dir"]) / "early"
    on(trainer, "on_step_end", lambda control: trainer.model.save_pretrained(early), 2)
    trainer.save_model = lambda folder, *args, **kwargs: __import__("shutil").copytree(early, folder)
    return trainer


def head_changed_in_the_file(**arguments: Any) -> Trainer:
    """Peft saves the layer of the base under an adapter on the head, and one row of it is another one in the file."""

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        next(t for n, t in tensors.items() if n.endswith("lm_head.base_layer.weight"))[3] += 1
        return tensors

    return _file_changed(arguments, change, lora={"target_modules": ["q_proj", "v_proj", "lm_head"]})


def half_of_the_file(**arguments: Any) -> Trainer:
    """Every other tensor is missing from the file."""
    return _file_changed(arguments, lambda tensors: dict(list(tensors.items())[::2]))


def rounded_file(**arguments: Any) -> Trainer:
    """The file is written in float16."""
    return _file_changed(arguments, lambda tensors: {n: t.half() for n, t in tensors.items()})


def nan_in_the_file(**arguments: Any) -> Trainer:
    """One NaN, in the file alone."""

    def poison(tensors: Any) -> Any:
        next(iter(tensors.values())).view(-1)[3] = math.nan
        return tensors

    return _file_changed(arguments, poison)


def tensors_swapped_in_the_file(**arguments: Any) -> Trainer:
    """q_proj and o_proj have changed places in the file."""

    def swap(tensors: Any) -> Any:
        return {
            n.replace("q_proj", "@").replace("o_proj", "q_proj").replace("@", "o_proj"): t.clone()
            for n, t in tensors.items()
        }

    return _file_changed(arguments, swap)


def another_alpha_in_the_file(**arguments: Any) -> Trainer:
    """adapter_config.json holds half the alpha that was trained with."""
    trainer = built(arguments)
    original = trainer.save_model

    def save_model(folder: str, *args: Any, **kwargs: Any) -> None:
        original(folder, *args, **kwargs)
        config = Path(folder) / "adapter_config.json"
        config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 4'))

    trainer.save_model = save_model
    return trainer


def gradients_enlarged(**arguments: Any) -> Trainer:
    """A hook multiplies gradients by 10,000 after they were seen, and clipping takes it away."""
    trainer = built(arguments)
    original = trainer.accelerator.clip_grad_norm_

    def clip(given: Any, *args: Any, **kwargs: Any) -> Any:
        given = list(given)
        for p in given:
            if p.grad is not None:
                p.grad.mul_(1e4)
        return original(given, *args, **kwargs)

    trainer.accelerator.clip_grad_norm_ = clip
    return trainer


def norm_faked(**arguments: Any) -> Trainer:
    """Trainer.log writes a grad_norm of 1."""

    class Own(Trainer):
        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            super().log(logs | ({"grad_norm": 1.0} if "grad_norm" in logs else {}), *args, **kwargs)

    return built(arguments, trainer_class=Own)


def kernel_in_half_precision(**arguments: Any) -> Trainer:
    """The training's own kernels for LoRA's sums compute them in bfloat16, whatever the precision."""
    return with_kernel(built(arguments), lambda layer, a, b, x: x.bfloat16() @ a.bfloat16().T @ b.bfloat16().T)


def layer_left_out(**arguments: Any) -> Trainer:
    """An attention written by hand takes the frozen layer of its queries, and not the one with the adapter."""
    return _without_queries(built(arguments))


def fused_layer_left_out(**arguments: Any) -> Trainer:
    """The same, where all adapted layers are of a class that computes in its own way."""
    trainer = built(arguments)
    for layer in lora_layers(trainer.model).values():
        layer.__class__ = Fused
    return _without_queries(trainer)


class Fused(Linear):  # type: ignore[misc] # peft's layers are untyped
    """A layer that computes its sum without calling the frozen layer within it."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Shapes (..., in) to (..., out)."""
        if self.disable_adapters:
            return super().forward(x, *args, **kwargs)
        a, b = self.lora_A["default"].weight, self.lora_B["default"].weight
        return torch.nn.functional.linear(x, self.base_layer.weight) + x @ a.T @ b.T * self.scaling["default"]


def _without_queries(trainer: Trainer) -> Trainer:
    for attention in (m for n, m in trainer.model.named_modules() if n.endswith("self_attn")):

        def forward(*args: Any, attention: Any = attention, inner: Any = attention.forward, **kwargs: Any) -> Any:
            layer = attention.q_proj
            attention.q_proj = getattr(layer, "base_layer", layer)
            try:
                return inner(*args, **kwargs)
            finally:
                attention.q_proj = layer

        attention.forward = forward
    return trainer


def products_in_float32(**arguments: Any) -> Trainer:
    """Under autocast, each layer computes in float32 and returns the type that is expected of it."""
    trainer = built(arguments)
    for layer in lora_layers(trainer.model).values():

        def forward(x: torch.Tensor, inner: Any = layer.forward) -> torch.Tensor:
            if not torch.is_autocast_enabled("cpu"):
                return inner(x)
            with torch.autocast("cpu", enabled=False):
                return inner(x.float()).bfloat16()

        layer.forward = forward
    return trainer


def half_of_the_layers_in_float32(**arguments: Any) -> Trainer:
    """Under autocast, the MLPs opt out."""

    def prepare(base: Any) -> Any:
        for layer in base.model.layers:
            inner = layer.mlp.forward

            def forward(hidden: torch.Tensor, inner: Any = inner) -> Any:
                with torch.autocast("cpu", enabled=False):
                    return inner(hidden.float())

            layer.mlp.forward = forward
        return base

    return built(arguments, prepare=prepare)


def float32_after_the_first_step(**arguments: Any) -> Trainer:
    """A callback takes autocast off the model after the first step, and puts it back at the end."""
    trainer = built(arguments)
    kept: list[Any] = []

    def bare(control: Any) -> None:
        kept.append(trainer.model.forward)
        trainer.model.forward = type(trainer.model).forward.__get__(trainer.model)

    on(trainer, "on_step_end", bare, 1)
    return on(trainer, "on_train_end", lambda: setattr(trainer.model, "forward", kept[0]), None)


def scaler_disabled(**arguments: Any) -> Trainer:
    """fp16 was asked for, and its GradScaler is switched off."""
    from pytest_sftguard.engine.building.cpu_float16 import make_real

    trainer = built(arguments)
    make_real(trainer)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", enabled=False)
    return trainer


class _Skipping(torch.optim.AdamW):
    def step(self, closure: Any = None) -> Any:
        self.calls = getattr(self, "calls", 0) + 1
        return None if self.calls == STEP else super().step(closure)


def optimizer_skips(**arguments: Any) -> Trainer:
    """An optimizer that leaves out the fourth step without a word."""
    trainer = built(arguments)
    trainer.optimizer = _Skipping(parameters(trainer), lr=1e-3)
    return trainer


def stopped_early(**arguments: Any) -> Trainer:
    """A callback stops the training in the fourth step."""
    return on(built(arguments), "on_step_end", lambda control: setattr(control, "should_training_stop", True))


def adapter_disabled(**arguments: Any) -> Trainer:
    """disable_adapter_layers, and inputs that require gradients so that backward still works."""

    def wrap(model: Any) -> Any:
        model.enable_input_require_grads()
        model.base_model.disable_adapter_layers()
        return model

    return built(arguments, wrap=wrap)


def adapter_disabled_midway(**arguments: Any) -> Trainer:
    """From the fourth step on, the adapter is switched off, and still requires gradients; momentum moves it on."""
    trainer = built(arguments)
    trainer.model.enable_input_require_grads()

    def disable() -> None:
        trainer.model.base_model.disable_adapter_layers()
        for n, p in trainer.model.named_parameters():
            p.requires_grad_("lora_" in n)

    return on(trainer, "on_step_begin", disable)


def wrong_adapter_active(**arguments: Any) -> Trainer:
    """A second adapter trains, and the first is the one that is active afterwards and saved."""
    from peft import LoraConfig

    def wrap(model: Any) -> Any:
        model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
        model.set_adapter("second")
        return model

    trainer = built(arguments, wrap=wrap)
    trainer.add_callback(At("on_train_end", lambda: trainer.model.set_adapter("default"), None))
    return trainer


def randomised_pissa(**arguments: Any) -> Trainer:
    """pissa_niter draws another decomposition on every load, so that the saved adapter sits on another base."""
    return built(arguments, lora={"init_lora_weights": "pissa_niter_4"})


def bfloat16_norms(**arguments: Any) -> Trainer:
    """Norms that are trained in bfloat16: updates of 0.001 at a weight of 1 are rounded away."""
    return built(arguments, lora={"modules_to_save": ["input_layernorm", "post_attention_layernorm"]})


def steps_without_a_gradient(**arguments: Any) -> Trainer:
    """A no_grad forward in autocast before the fourth step leaves cached casts without a graph: gradients are None."""
    trainer = built(arguments)

    def drop() -> None:
        for p in parameters(trainer, "layers.0"):
            p.grad = None

    original = trainer.accelerator.backward

    def backward(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        if trainer.state.global_step == STEP - 1:
            drop()
        return result

    trainer.accelerator.backward = backward
    return trainer


def labels_of_one_step_masked(**arguments: Any) -> Trainer:
    """A collator that masks every label of its fourth batch: a loss of 0 over no tokens."""
    from pytest_sftguard.engine.models import tiny

    calls = [0]

    def collate(features: Any) -> Any:
        batch = tiny.collate(features)
        calls[0] += 1
        if calls[0] == STEP:
            batch["labels"].fill_(-100)
        return batch

    return built(arguments, collator=collate)


def weights_scaled_at_the_end(**arguments: Any) -> Trainer:
    """A callback that zeroes one lora_B when the training ends."""
    trainer = built(arguments)
    trainer.add_callback(At("on_train_end", lambda: parameters(trainer, "lora_B")[1].data.zero_(), None))
    return trainer


def nan_at_the_end(**arguments: Any) -> Trainer:
    """A callback that divides by zero when the training ends."""
    trainer = built(arguments)
    trainer.add_callback(At("on_train_end", lambda: parameters(trainer, "lora_B")[1].data.mul_(math.nan), None))
    return trainer


def _write(to: list[torch.nn.Parameter], values: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for p, value in zip(to, values, strict=True):
            p.copy_(value)


def _flip(tensor: torch.Tensor) -> None:
    tensor.data.view(-1).view(torch.int32)[0] ^= 1


def _rotary(trainer: Trainer) -> torch.Tensor:
    return next(b for n, b in trainer.model.named_buffers() if n.endswith("inv_freq"))


def _file_changed(arguments: dict[str, Any], change: Callable[[Any], Any], **built_as: Any) -> Trainer:
    trainer = built(arguments, **built_as)
    original = trainer.save_model

    def save_model(folder: str, *args: Any, **kwargs: Any) -> None:
        original(folder, *args, **kwargs)
        path = Path(folder) / "adapter_model.safetensors"
        save_file({n: t.contiguous() for n, t in change(load_file(path)).items()}, path)

    trainer.save_model = save_model
    return trainer
