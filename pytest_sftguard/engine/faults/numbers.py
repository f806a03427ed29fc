"""Faults in the number formats: what half precision cannot hold."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from fractions import Fraction
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import Trainer

from pytest_sftguard.engine.faults._adapting import adapting
from pytest_sftguard.engine.faults._training import at, cast, largest_scale, set_scale, wrap
from pytest_sftguard.engine.faults.fault import Fault


class Fp16AdamEpsZeroDivision(Fault):
    """Adam's eps of 1e-8 is 0 in float16, and 0 / 0 writes NaN into every lora_A at the first step."""

    source = "https://github.com/OpenBMB/MiniCPM-V/issues/212"
    injects = "casts the trainable tensors to float16, with optim=adamw_torch"
    silent = False
    reported_by = ("weights_and_moments_finite", "raw_loss_finite", "gradients_finite")
    mechanism = "eps_underflow_in_float16"
    step = 1
    tensor = "lora_A"
    precision = "fp16-true"
    arguments: ClassVar = {"optim": "adamw_torch"}

    def alter(self, trainer: Trainer) -> None:
        cast(trainer, torch.float16)


class Fp16AdamMomentUnderflowBlowup(Fault):
    """Fused Adam stores its second moment in float16, as 0: updates are thousands of learning rates."""

    source = "https://github.com/matanbt/TROPT/pull/8"
    injects = "casts the trainable tensors to float16, with optim=adamw_torch_fused"
    reported_by = ("update_upper_bound", "update_lower_bound")
    mechanism = "moments_underflow_in_float16"
    tensor = "lora_"
    precision = "fp16-true"
    arguments: ClassVar = {"optim": "adamw_torch_fused", "learning_rate": 1e-4}

    def alter(self, trainer: Trainer) -> None:
        cast(trainer, torch.float16)


class Bf16AdapterUpdateSwallow(Fault):
    """Updates that are small beside the elements of lora_A round to nothing in bfloat16: it stays at its start."""

    source = "https://github.com/pytorch/ao/pull/1124"
    injects = "casts the trainable tensors to bfloat16, with learning_rate=1e-5"
    reported_by = ("update_lower_bound", "every_factor_moves")
    mechanism = "updates_swallowed_in_bfloat16"
    tensor = "lora_A"
    precision = "bf16-true"
    arguments: ClassVar = {"learning_rate": 1e-5}

    def alter(self, trainer: Trainer) -> None:
        cast(trainer, torch.bfloat16)


class WeightDecaySwallowedInBf16(Fault):
    """A decay of lr x wd x w is below the resolution of bfloat16: there is none at all."""

    source = "https://github.com/Nerogar/OneTrainer/issues/996"
    injects = "casts the trainable tensors to bfloat16, with weight_decay=0.1 and learning_rate=1e-4"
    reported_by = ("fp32_master",)
    mechanism = "updates_swallowed_in_bfloat16"
    tensor = "lora_"
    arguments: ClassVar = {"weight_decay": 0.1, "learning_rate": 1e-4}

    def alter(self, trainer: Trainer) -> None:
        cast(trainer, torch.bfloat16)


class DoraMagnitudeFrozen(Fault):
    """DoRA's magnitudes in bfloat16, as with quantised bases, stay where they were: it is a run of plain LoRA."""

    source = "https://github.com/huggingface/trl/pull/7272"
    injects = "sets use_dora=True and casts the magnitudes to bfloat16, with learning_rate=1e-4"
    reported_by = ("fp32_master", "every_factor_moves")
    mechanism = "updates_swallowed_in_bfloat16"
    tensor = "lora_magnitude_vector"
    arguments: ClassVar = {"learning_rate": 1e-4}

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        with adapting(lambda base, config: setattr(config, "use_dora", True)):
            return super().trainer(build, **arguments)

    def alter(self, trainer: Trainer) -> None:
        cast(trainer, torch.bfloat16, "lora_magnitude_vector")


class AttemptingToUnscaleFp16(Fault):
    """Scripts call `.half()` on a finished adapter, and the loss scaler refuses to unscale float16 gradients."""

    source = "https://github.com/huggingface/diffusers/issues/6086"
    injects = "casts the trainable tensors to float16, with fp16=True"
    silent = False
    reported_by = ("fp32_master",)
    mechanism = "half_trainables_under_a_scaler"
    tensor = "lora_"
    precision = "fp16-mixed"

    def alter(self, trainer: Trainer) -> None:
        cast(trainer, torch.float16)


class LossScaleCollapse(Fault):
    """The forward pass overflows, which no loss scale can cure: it halves to nothing, and the run completes."""

    source = "https://github.com/microsoft/DeepSpeed/issues/697"
    injects = "multiplies the weights of both layers of one MLP by 3e4, under a loss scaler"
    reported_by = ("effective_steps", "every_factor_moves", "raw_loss_finite")
    mechanism = "loss_scale_collapse"
    precision = "fp16-mixed"
    steps = 30

    def alter(self, trainer: Trainer) -> None:
        _overflow_float16(trainer.model)


class Fp16ForwardOverflow(Fault):
    """Activations of a model that was trained in bfloat16 exceed 65504, and are infinite in float16."""

    source = "https://github.com/huggingface/transformers/issues/5651"
    injects = "multiplies the weights of both layers of one MLP by 3e4"
    silent = False
    reported_by = ("raw_loss_finite", "gradients_finite")
    mechanism = "forward_overflow_in_float16"
    step = 1
    precision = "fp16-true"

    def alter(self, trainer: Trainer) -> None:
        _overflow_float16(trainer.model)


class AmpWarmupSkipsAreNormal(Fault):
    """Control: under a loss scaler that starts too high, the first steps have NaN norms and change nothing."""

    source = "https://github.com/huggingface/transformers/pull/11144"
    injects = "starts the GradScaler at four times what the first batch allows: healthy"
    precision = "fp16-mixed"
    silent = False

    def alter(self, trainer: Trainer) -> None:
        at(trainer, "on_train_begin", lambda: set_scale(trainer, 4 * largest_scale(trainer)))


class AutocastCacheKillsGradients(Fault):
    """Control: a forward pass without gradients fills autocast's cache, and torch no longer reuses its casts."""

    source = "https://github.com/pytorch/pytorch/issues/65766"
    injects = "runs a forward pass under no_grad, in the autocast in which the loss is computed next: healthy now"
    precision = "bf16-mixed"

    def alter(self, trainer: Trainer) -> None:
        def twice(compute_loss: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            with trainer.accelerator.autocast():
                training = model.training
                model.eval()
                with torch.no_grad():
                    model(**{k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask")})
                model.train(training)
                return compute_loss(model, inputs, *args, **kwargs)

        wrap(trainer, "compute_loss", twice)


@torch.no_grad()
def _overflow_float16(model: Any) -> None:
    """Multiply the weights of the two layers of the last MLP, or of the last two linear layers if there is no MLP.

    The weights stay within the range of float16; the activations stay only within that of the wider types.
    """
    for layer in _last_mlp(model):
        layer.weight.mul_(min(3e4, 3e4 / float(layer.weight.abs().max())))


def _last_mlp(model: Any) -> tuple[Any, Any]:
    """Two consecutive linear layers before the head: one that widens, and one that narrows again."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    head = getattr(head, "base_layer", head)
    linear = [m for n, m in model.named_modules() if "lora_" not in n and m is not head and _is_frozen_linear(m)]
    pairs = list(itertools.pairwise(linear))
    mlps = [p for p in pairs if _widening(p[0]) > 1 and _widening(p[0]) * _widening(p[1]) == 1]
    return (mlps or pairs)[-1]


def _is_frozen_linear(module: nn.Module) -> bool:
    """Whether this is a linear layer that is neither trained nor quantised."""
    weight: Any = getattr(module, "weight", None)
    linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    return linear and weight.is_floating_point() and not weight.requires_grad


def _widening(layer: Any) -> Fraction:
    """Outputs of a linear layer for each input."""
    one, other = layer.weight.shape
    return Fraction(one, other) if isinstance(layer, nn.Linear) else Fraction(other, one)
