"""Trainings for the course of gradients and the optimizer's update: faults, and what is like them and sound."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from tests.targets.faulty import on, parameters
from tests.targets.healthy import built

# the gradients of the two factors belong to one product


def factor_scaled(**arguments: Any) -> Trainer:
    """A hook makes the gradient of one factor 1 % larger."""
    trainer = built(arguments)
    parameters(trainer, "lora_B")[2].register_hook(lambda g: 1.01 * g)
    return trainer


def factor_of_an_older_step(**arguments: Any) -> Trainer:
    """From the fifth backward pass on, one factor keeps the gradient of the fourth."""
    trainer, seen = built(arguments), list[Tensor]()

    def kept(gradient: Tensor) -> Tensor:
        seen.append(gradient.clone())
        return seen[min(len(seen), 4) - 1]

    parameters(trainer, "lora_A")[1].register_hook(kept)
    return trainer


def two_elements_exchanged(**arguments: Any) -> Trainer:
    """Two elements of one gradient have changed places, which leaves its norm."""

    def exchanged(gradient: Tensor) -> Tensor:
        flat = gradient.flatten().clone()
        flat[[3, 40]] = flat[[40, 3]]
        return flat.view_as(gradient)

    trainer = built(arguments)
    parameters(trainer, "lora_A")[0].register_hook(exchanged)
    return trainer


def rounded_between_the_factors(**arguments: Any) -> Trainer:
    """What A makes is rounded before B takes it, and the backward pass knows nothing of it."""
    trainer = built(arguments)
    down = next(m for n, m in trainer.model.named_modules() if n.endswith("lora_A.default"))
    down.register_forward_hook(lambda module, inputs, h: h + (h.detach().mul(8).round().div(8) - h.detach()))
    return trainer


# the optimizer gets what backward left


def gradient_permuted_before_the_step(**arguments: Any) -> Trainer:
    """A callback turns the rows of one gradient around, whose norm stays."""
    trainer = built(arguments)
    return on(
        trainer,
        "on_pre_optimizer_step",
        lambda: parameters(trainer, "lora_A")[3].grad.copy_(parameters(trainer, "lora_A")[3].grad.flip(0)),
        None,
    )


def small_gradient_scaled_before_the_step(**arguments: Any) -> Trainer:
    """A callback makes one tensor's gradient 0.1 % larger: less than the norm of all of them shows."""
    trainer = built(arguments)
    return on(trainer, "on_pre_optimizer_step", lambda: parameters(trainer, "lora_B")[0].grad.mul_(1.001), None)


# the update is the optimizer's


def _stepping(arguments: dict[str, Any], change: Any) -> Trainer:
    """A training in which `change` is called with a tensor and its value before, after each step."""
    trainer = built(arguments)
    optimizer = trainer.create_optimizer()
    step, chosen = optimizer.step, parameters(trainer, "lora_A")[2]

    def stepped(*args: Any, **kwargs: Any) -> Any:
        before = chosen.detach().clone()
        result = step(*args, **kwargs)
        with torch.no_grad():
            change(chosen, before)
        return result

    optimizer.step = stepped
    return trainer


def update_scaled(**arguments: Any) -> Trainer:
    """The update of one tensor is 1 % larger than the optimizer's."""
    return _stepping(arguments, lambda tensor, before: tensor.add_(0.01 * (tensor - before)))


def update_left_out_in_part(**arguments: Any) -> Trainer:
    """A few elements of one tensor stay."""
    return _stepping(arguments, lambda tensor, before: tensor[0, :4].copy_(before[0, :4]))


# the loss is the model's


def _losses(arguments: dict[str, Any], change: Any) -> Trainer:
    """A training in which `change` is called with each loss, and the number of its step."""
    trainer = built(arguments)
    compute_loss = trainer.compute_loss

    def changed(*args: Any, **kwargs: Any) -> Any:
        loss = compute_loss(*args, **kwargs)
        return change(loss, trainer.state.global_step + 1)

    trainer.compute_loss = changed
    return trainer


def loss_divided_again(**arguments: Any) -> Trainer:
    """compute_loss divides by the accumulation, as the Trainer does."""
    return _losses(arguments, lambda loss, step: loss / 2)


def loss_negated(**arguments: Any) -> Trainer:
    """compute_loss turns the sign around."""
    return _losses(arguments, lambda loss, step: -loss)


def loss_scaled_later(**arguments: Any) -> Trainer:
    """From the third step on the loss is 1 % larger."""
    return _losses(arguments, lambda loss, step: loss * 1.01 if step > 2 else loss)


def loss_with_an_offset(**arguments: Any) -> Trainer:
    """A constant is added, which the gradient does not show."""
    return _losses(arguments, lambda loss, step: loss + 0.25)


def loss_rounded(**arguments: Any) -> Trainer:
    """The loss is rounded to eighths, and its gradient is not."""
    return _losses(arguments, lambda loss, step: loss + (loss.detach().mul(8).round().div(8) - loss.detach()))


def penalty_without_a_gradient(**arguments: Any) -> Trainer:
    """A penalty on the adapter's size is computed under no_grad, so that it is in the loss alone."""
    trainer: Trainer

    def penalised(loss: Tensor, step: int) -> Tensor:
        with torch.no_grad():
            penalty = torch.stack([p.square().sum() for p in parameters(trainer, "lora_A")]).sum()
        return loss + 0.01 * step * penalty

    trainer = _losses(arguments, penalised)
    return trainer


def noise_at_times(**arguments: Any) -> Trainer:
    """In every third step a random number is added to the loss."""
    noise = torch.Generator().manual_seed(5)
    return _losses(arguments, lambda loss, step: loss - torch.randn((), generator=noise) if step % 3 == 0 else loss)


# sound


def focal_loss(**arguments: Any) -> Trainer:
    """The loss is a function of the model's own that is no multiple: sound."""
    return _losses(arguments, lambda loss, step: (1 - (-loss).exp()) ** 2 * loss)


def penalty_that_grows(**arguments: Any) -> Trainer:
    """A second loss is added, with a weight that is 0 at first: sound."""
    trainer = built(arguments)
    compute_loss = trainer.compute_loss

    def changed(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss, outputs = compute_loss(model, inputs, *args, **kwargs | {"return_outputs": True})
        confident = outputs.logits.float().logsumexp(-1).square().mean()
        return loss + 1e-2 * trainer.state.global_step * confident

    trainer.compute_loss = changed
    return trainer


def clipped_by_hooks(**arguments: Any) -> Trainer:
    """Hooks clip each element, as many do: sound."""
    trainer = built(arguments)
    for parameter in parameters(trainer):
        parameter.register_hook(lambda g: g.clamp(-1e-2, 1e-2))
    return trainer


def penalty_on_the_factors(**arguments: Any) -> Trainer:
    """The loss holds a penalty on each factor: sound."""
    trainer = built(arguments)
    compute_loss = trainer.compute_loss

    def penalised(*args: Any, **kwargs: Any) -> Any:
        return compute_loss(*args, **kwargs) + 0.1 * sum(p.square().sum() for p in parameters(trainer))

    trainer.compute_loss = penalised
    return trainer


def clipped_hard(**arguments: Any) -> Trainer:
    """Every step is clipped by the Trainer, which scales all gradients alike: sound."""
    return built(arguments | {"max_grad_norm": 0.01})


def two_groups(**arguments: Any) -> Trainer:
    """Two groups of parameters have their own rate, decay and betas: sound."""
    trainer = built(arguments)
    half = [parameters(trainer, f"lora_{factor}") for factor in "AB"]
    trainer.optimizer = torch.optim.AdamW(
        [{"params": half[0], "lr": 1e-3}, {"params": half[1], "lr": 2e-3, "weight_decay": 0.1, "betas": (0.8, 0.99)}]
    )
    return trainer


def momentum(**arguments: Any) -> Trainer:
    """SGD with momentum of Nesterov and decay: sound."""
    trainer = built(arguments)
    trainer.optimizer = torch.optim.SGD(parameters(trainer), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)
    return trainer


# the loss counts once


def _written_out(arguments: dict[str, Any], change: Any) -> Trainer:
    """A training whose compute_loss makes a loss of the logits: `change` is given cross-entropies, shape (labels,)."""
    trainer = built(arguments)

    def compute_loss(model: Any, inputs: Any, *args: Any, num_items_in_batch: Any = None, **kwargs: Any) -> Tensor:
        labels = inputs.pop("labels")[:, 1:]
        logits = model(**inputs).logits[:, :-1].float()
        every = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        return change(every[labels != -100], num_items_in_batch)

    trainer.compute_loss = compute_loss
    return trainer


def mean_that_nothing_divides(**arguments: Any) -> Trainer:
    """The loss is the mean of each micro-batch, and the Trainer takes it for divided."""
    return _written_out(arguments, lambda every, items: every.mean())


def number_of_labels_left_out(**arguments: Any) -> Trainer:
    """compute_loss calls the Trainer's own without the number of the step's labels, as an old signature does."""
    trainer = built(arguments)
    compute_loss = trainer.compute_loss
    trainer.compute_loss = lambda model, inputs, *args, **kwargs: compute_loss(model, inputs)
    return trainer


def loss_function_that_takes_no_number(**arguments: Any) -> Trainer:
    """A compute_loss_func leaves out the number of the step's labels, by which nobody else divides."""

    def mean(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        logits = outputs.logits[:, :-1].float()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())

    trainer = built(arguments)
    trainer.compute_loss_func = mean
    return trainer


def divided_by_own_code_too(**arguments: Any) -> Trainer:
    """The loss is divided by all labels of the step, and once more by the micro-batches."""
    return _written_out(arguments, lambda every, items: every.sum() / items / 2)


def written_out_and_tripled(**arguments: Any) -> Trainer:
    """The loss is three times the mean over the labels."""
    return _written_out(arguments, lambda every, items: 3 * every.sum() / items)


def written_out(**arguments: Any) -> Trainer:
    """The loss is the mean over the labels of the step, written out: sound."""
    return _written_out(arguments, lambda every, items: every.sum() / items)


def divided_in_compute_loss(**arguments: Any) -> Trainer:
    """compute_loss divides a mean by the micro-batches, because the Trainer does not: sound."""
    trainer = built(arguments)
    compute_loss = trainer.compute_loss
    count = trainer.args.gradient_accumulation_steps
    trainer.compute_loss = lambda model, inputs, *args, **kwargs: compute_loss(model, inputs) / count
    return trainer


def written_out_with_a_penalty(**arguments: Any) -> Trainer:
    """The loss has a term beside the mean over the labels: sound."""
    return _written_out(arguments, lambda every, items: (every.sum() + 0.1 * every.square().sum()) / items)


def sum_over_tokens(**arguments: Any) -> Trainer:
    """The loss is a sum over tokens on purpose: sound."""
    return _written_out(arguments, lambda every, items: every.sum())
