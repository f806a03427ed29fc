"""Targets whose gradient, loss or attention is wrong in one place, and healthy ones that look similar.

Losses are right up to rounding in most of them, and fall: nothing else of the guard sees these faults.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Trainer

from pytest_sftguard.engine.models import sums

Change = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class _Silu(torch.autograd.Function):
    """SiLU whose backward forgets a term."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return functional.silu(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        [x] = ctx.saved_tensors
        return gradient * x.sigmoid()


class _Activation(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _Silu.apply(x)


class _Doubled(torch.autograd.Function):
    """The identity, with a gradient of twice its size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


def wrong_silu(**arguments: Any) -> Trainer:
    """The activation of the first layer has a wrong backward."""
    trainer = sums.build_trainer(**arguments)
    _layers(trainer)[0].mlp.act_fn = _Activation()
    return trainer


def one_factor_doubled(**arguments: Any) -> Trainer:
    """The gradient of one factor among all is doubled, and every other one is right."""
    trainer = sums.build_trainer(**arguments)
    factor = _layers(trainer)[0].mlp.up_proj.lora_A["default"]
    factor.forward = lambda x: functional.linear(x, _Doubled.apply(factor.weight))
    return trainer


def keys_detached(**arguments: Any) -> Trainer:
    """Keys and values get no gradient."""
    trainer = sums.build_trainer(**arguments)
    for layer in _layers(trainer):
        layer.self_attn.k_proj.register_forward_hook(lambda module, args, out: out.detach())
    return trainer


def backward_of_three_losses(**arguments: Any) -> Trainer:
    """What is differentiated is three times the loss that is reported."""

    class Own(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            original = self.accelerator.backward
            self.accelerator.backward = lambda loss, **more: original(3 * loss, **more)
            try:
                return super().training_step(*args, **kwargs)
            finally:
                self.accelerator.backward = original

    return _of_class(Own, arguments)


def self_distillation(**arguments: Any) -> Trainer:
    """Healthy: a loss with a teacher that is the model itself, and gets no gradient."""

    def loss(model: Any, inputs: Any) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        logits, wanted = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        teacher = (logits.detach() / 2).softmax(-1)
        kept = wanted != -100
        soft = functional.cross_entropy(logits[kept], teacher[kept])
        return functional.cross_entropy(logits, wanted) + 0.3 * soft, outputs

    return _with_loss(loss, arguments)


def without_shift(**arguments: Any) -> Trainer:
    """Each token is to predict itself."""
    return _changed(lambda logits, labels: (logits, labels), arguments)


def clamped_to_padding(**arguments: Any) -> Trainer:
    """The label -100 becomes the token 0."""
    return _changed(lambda logits, labels: (logits[:, :-1], labels[:, 1:].clamp(min=0)), arguments)


def one_row_counts(**arguments: Any) -> Trainer:
    """The loss is that of the first row."""
    return _changed(lambda logits, labels: (logits[:1, :-1], labels[:1, 1:]), arguments)


def half_of_the_tokens_count(**arguments: Any) -> Trainer:
    """The second half of the labels is left out."""

    def change(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        wanted = labels[:, 1:].clone()
        rows, places = (wanted != -100).nonzero(as_tuple=True)
        wanted[rows[len(rows) // 2 :], places[len(rows) // 2 :]] = -100
        return logits[:, :-1], wanted

    return _changed(change, arguments)


def with_loss_mask(**arguments: Any) -> Trainer:
    """Healthy: the batch says beside the labels which tokens count."""
    trainer = _with_loss(_masked, arguments | {"remove_unused_columns": False})
    original = trainer.data_collator

    def collate(features: Any) -> Any:
        batch = original(features)
        batch["loss_mask"] = (batch["labels"] != -100) & (batch["labels"] != 2)
        return batch

    trainer.data_collator = collate
    return trainer


def negated(**arguments: Any) -> Trainer:
    """The loss is maximised."""
    trainer = sums.build_trainer(**arguments)
    original = trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: -original(*args, **kwargs)
    return trainer


def labels_of_the_next_row(**arguments: Any) -> Trainer:
    """The answers are those of other rows."""
    return _changed(
        lambda logits, labels: (
            logits[:, :-1],
            torch.where(labels != -100, labels.flip(0).clamp(min=5), labels)[:, 1:],
        ),
        arguments,
    )


def smoothed(**arguments: Any) -> Trainer:
    """Healthy: label smoothing."""
    return sums.build_trainer(**arguments | {"label_smoothing_factor": 0.1})


def without_causality(**arguments: Any) -> Trainer:
    """A mask of four dimensions hides padding and nothing else."""
    trainer = sums.build_trainer(**arguments)
    original = trainer.data_collator

    def collate(features: Any) -> Any:
        batch = original(features)
        width = batch["input_ids"].shape[1]
        seen = (batch["attention_mask"] == 1)[:, None, None].expand(-1, 1, width, width)
        batch["attention_mask"] = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        return batch

    trainer.data_collator = collate
    return trainer


def one_layer_sees_all(**arguments: Any) -> Trainer:
    """One layer of two attends to all tokens."""
    trainer = sums.build_trainer(**arguments)
    attention = _layers(trainer)[1].self_attn
    original = attention.forward

    def forward(hidden_states: Tensor, **kwargs: Any) -> Any:
        rows, width, _ = hidden_states.shape
        return original(hidden_states, **kwargs | {"attention_mask": torch.zeros(rows, 1, width, width)})

    attention.forward = forward
    return trainer


def rows_are_pooled(**arguments: Any) -> Trainer:
    """A layer adds the mean of the whole batch."""
    trainer = sums.build_trainer(**arguments)
    _layers(trainer)[0].mlp.register_forward_hook(
        lambda module, args, out: out + 0.05 * out.roll(1, 0).mean(1, keepdim=True)
    )
    return trainer


def _layers(trainer: Trainer) -> Any:
    return trainer.model.get_base_model().model.layers


def _of_class(trainer_class: type[Trainer], arguments: dict[str, Any]) -> Trainer:
    trainer = sums.build_trainer(**arguments)
    trainer.__class__ = trainer_class
    return trainer


def _with_loss(loss: Callable[[Any, Any], Any], arguments: dict[str, Any]) -> Trainer:
    class Own(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            found, outputs = loss(model, inputs)
            return (found, outputs) if return_outputs else found

    return _of_class(Own, arguments)


def _changed(change: Change, arguments: dict[str, Any]) -> Trainer:
    def loss(model: Any, inputs: Any) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        logits, wanted = change(outputs.logits, labels)
        return functional.cross_entropy(logits.flatten(0, 1), wanted.flatten()), outputs

    return _with_loss(loss, arguments)


def _masked(model: Any, inputs: Any) -> Any:
    labels, mask = inputs.pop("labels"), inputs.pop("loss_mask")
    outputs = model(**inputs)
    wanted = torch.where(mask, labels, -100)[:, 1:]
    return functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), wanted.flatten()), outputs


def _hooked(hook: Callable[[torch.Tensor], torch.Tensor | None], arguments: dict[str, Any]) -> Trainer:
    """Every trainable tensor has `hook`."""
    trainer = sums.build_trainer(**arguments)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.register_hook(hook)
    return trainer


def gradients_doubled_by_hooks(**arguments: Any) -> Trainer:
    """Hooks double every gradient alike."""
    return _hooked(lambda gradient: 2 * gradient, arguments)


def gradients_halved_in_place(**arguments: Any) -> Trainer:
    """Hooks write into the gradient that they are given."""

    def halved(gradient: torch.Tensor) -> None:
        gradient.mul_(0.5)

    return _hooked(halved, arguments)


def gradients_clipped_by_value(**arguments: Any) -> Trainer:
    """Hooks clip each entry."""
    return _hooked(lambda gradient: gradient.clamp(-1e-2, 2e-2), arguments)


def gradients_clipped_by_norm(**arguments: Any) -> Trainer:
    """Hooks clip the norm of each tensor's gradient."""
    return _hooked(lambda gradient: gradient * min(1.0, 1e-2 / (float(gradient.norm()) + 1e-12)), arguments)


def gradients_masked(**arguments: Any) -> Trainer:
    """Hooks keep the first half of the rows of each tensor as they are."""

    def masked(gradient: torch.Tensor) -> torch.Tensor:
        kept = gradient.clone()
        kept[len(kept) // 2 :] = 0
        return kept

    return _hooked(masked, arguments)


class _Late(torch.autograd.Function):
    """The identity, with a gradient that is half as large."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        """Return `value`."""
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        """Return half of the gradient."""
        return 0.5 * gradients[0]


def _half_from(first: int, every: int, arguments: dict[str, Any]) -> Trainer:
    trainer = sums.build_trainer(**arguments)

    def half(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        step = trainer.state.global_step + 1
        return _Late.apply(output) if step >= first and (step - first) % every == 0 else output

    _layers(trainer)[1].mlp.down_proj.register_forward_hook(half)
    return trainer


def wrong_from_the_third_step(**arguments: Any) -> Trainer:
    """The gradient of one layer is half as large from step 3 on."""
    return _half_from(3, 1, arguments)


def wrong_at_even_steps(**arguments: Any) -> Trainer:
    """The gradient of one layer is half as large at every second step."""
    return _half_from(2, 2, arguments)
