"""Healthy trainings that draw, sample, weigh, stop or mask as few do: what must come out without an alarm.

Each function is a target of its own.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import IterableDataset, Sampler, WeightedRandomSampler
from transformers import (
    EarlyStoppingCallback,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    Trainer,
    TrainerCallback,
)

from pytest_sftguard.engine.models import tiny
from tests.targets import adapters
from tests.targets.healthy import SMALL, built, collate_left


class _Noise(nn.Module):
    """Adds noise in training, out of torch's generator or one of its own."""

    def __init__(self, inner: nn.Module, own: bool) -> None:
        super().__init__()
        self.inner = inner
        self.generator = torch.Generator().manual_seed(7) if own else None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        found = self.inner(*args, **kwargs)
        if not self.training:
            return found
        noise = torch.randn(found.shape, generator=self.generator, dtype=torch.float32)
        return found + 0.1 * noise.to(found)


class _Depth(nn.Module):
    """Leaves a block out now and then."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        keep = torch.rand(()) if self.training else 1.0
        return self.inner(*args, **kwargs) * float(keep > 0.3)


def noisy(**arguments: Any) -> Trainer:
    """A layer of one's own that adds noise to the output of an MLP."""
    return built(arguments, prepare=lambda base: _replaced(base, lambda mlp: _Noise(mlp, own=False)))


def noisy_generator(**arguments: Any) -> Trainer:
    """The same, from a generator of its own."""
    return built(arguments, prepare=lambda base: _replaced(base, lambda mlp: _Noise(mlp, own=True)))


def stochastic_depth(**arguments: Any) -> Trainer:
    """An MLP that is left out of some passes, so that its factors have no gradient there."""
    return built(arguments, prepare=lambda base: _replaced(base, _Depth))


def jittered_router(**arguments: Any) -> Trainer:
    """A mixture of experts whose router's input is multiplied by noise."""
    config = MixtralConfig(
        **SMALL, num_local_experts=4, num_experts_per_tok=2, router_jitter_noise=0.2, output_router_logits=True
    )
    return built(arguments, config=config, lora={"target_modules": ["q_proj", "v_proj"]})


def noisy_checkpointed(**arguments: Any) -> Trainer:
    """Noise under gradient checkpointing, which draws it again."""
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    return noisy(**options | arguments)


class _Queue(Trainer):
    """Adds a term that looks back at the batches before."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        queue = vars(self).setdefault("queue", [])
        if model.training:
            queue.append(float(loss.detach()))
        return loss * (1 + 0.1 * len(queue))


def queue(**arguments: Any) -> Trainer:
    """A loss that depends on how many batches came before."""
    return built(arguments, trainer_class=_Queue)


class _Teacher(Trainer):
    """Adds the distance to an average of the model's own weights."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        with torch.no_grad(), model.disable_adapter():
            base = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits
        apart = functional.kl_div(
            outputs.logits.float().log_softmax(-1), base.float().log_softmax(-1), log_target=True, reduction="none"
        )
        loss = loss + 0.1 * apart.sum(-1).mean()
        return (loss, outputs) if return_outputs else loss


def distilled(**arguments: Any) -> Trainer:
    """A penalty for leaving the base, computed with the adapter disabled."""
    return built(arguments, trainer_class=_Teacher)


class _Weighted(Trainer):
    """Weighs tokens by their class."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        outputs = model(**{k: v for k, v in inputs.items() if k != "labels"})
        weights = torch.linspace(0.5, 2.0, outputs.logits.shape[-1], device=outputs.logits.device)
        loss = functional.cross_entropy(
            outputs.logits[:, :-1].flatten(0, 1).float(), inputs["labels"][:, 1:].flatten(), weight=weights
        )
        return (loss, outputs) if return_outputs else loss


def class_weights(**arguments: Any) -> Trainer:
    """A weight for each token id."""
    return built(arguments, trainer_class=_Weighted)


class _Auxiliary(Trainer):
    """Adds a penalty on the logits' scale."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        loss = loss + 1e-3 * outputs.logits.float().logsumexp(-1).square().mean()
        return (loss, outputs) if return_outputs else loss


def auxiliary_loss(**arguments: Any) -> Trainer:
    """A z-loss over all tokens."""
    return built(arguments, trainer_class=_Auxiliary)


def eager_auxiliary(**arguments: Any) -> Trainer:
    """The same with eager attention: no path is plainer than the training's own."""

    def prepare(base: Any) -> Any:
        base.set_attn_implementation("eager")
        return base

    return built(arguments, trainer_class=_Auxiliary, prepare=prepare)


class _Replacing(Trainer):
    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        weights = torch.linspace(1.0, 4.0, len(self.train_dataset))
        generator = torch.Generator().manual_seed(int(self.args.seed))
        return WeightedRandomSampler(weights.tolist(), len(self.train_dataset), True, generator)


def with_replacement(**arguments: Any) -> Trainer:
    """Rows drawn with replacement, the later ones more often."""
    return built(arguments, trainer_class=_Replacing)


class _ByLength(Sampler[int]):
    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return iter(sorted(range(len(self.rows)), key=lambda i: len(self.rows[i]["input_ids"])))

    def __len__(self) -> int:
        return len(self.rows)


class _Curriculum(Trainer):
    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return _ByLength(self.train_dataset)


def curriculum(**arguments: Any) -> Trainer:
    """Short rows first."""
    return built(arguments, trainer_class=_Curriculum)


def grouped_by_length(**arguments: Any) -> Trainer:
    """Rows of like length in one batch."""
    return built({"train_sampling_strategy": "group_by_length"} | arguments)


class _Endless(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Any:
        while True:
            yield from tiny.rows(64)


def endless(**arguments: Any) -> Trainer:
    """A stream without an end."""
    return built(arguments, dataset=_Endless())


def small_steps(**arguments: Any) -> Trainer:
    """SGD with momentum at a rate that suits it."""
    return built({"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.1} | arguments)


def nadam(**arguments: Any) -> Trainer:
    """NAdam of torch."""
    trainer = built(arguments)
    trainer.optimizer = torch.optim.NAdam([p for p in trainer.model.parameters() if p.requires_grad], lr=1e-3)
    return trainer


def norms_in_eval_mode(**arguments: Any) -> Trainer:
    """The first layer stays in evaluation mode throughout."""

    class Own(Trainer):
        def training_step(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            layers = self.accelerator.unwrap_model(model).get_base_model().model.layers
            mode, layers[0].train = layers[0].train, lambda mode=True: layers[0]
            layers[0].eval()
            try:
                return super().training_step(model, *args, **kwargs)
            finally:
                layers[0].train = mode

    return built(arguments, trainer_class=Own, lora={"lora_dropout": 0.1})


def clipping_hooks(**arguments: Any) -> Trainer:
    """Hooks that clip the gradient of each tensor."""
    trainer = built(arguments)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda gradient: gradient.clamp(-1e-2, 1e-2))
    return trainer


def rate_changed(**arguments: Any) -> Trainer:
    """A callback that halves the learning rate at the third step."""

    class Halves(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                for group in kwargs["optimizer"].param_groups:
                    group["lr"] *= 0.5
                scheduler = kwargs["lr_scheduler"]
                scheduler.base_lrs = [rate * 0.5 for rate in scheduler.base_lrs]

    return built(arguments, callbacks=[Halves()])


def plateau(**arguments: Any) -> Trainer:
    """A rate that falls where the evaluations stop getting better."""
    defaults = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1}
    return built(defaults | arguments, eval_dataset=tiny.rows(64)[:8])


def stopped_early(**arguments: Any) -> Trainer:
    """Ends after two evaluations that are no better: fewer steps than asked for, by request."""
    defaults = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
        "load_best_model_at_end": True,
    }
    return built(
        defaults | arguments | {"save_strategy": "steps"},
        eval_dataset=tiny.rows(64)[:8],
        # no evaluation is that much better than the one before it
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2, early_stopping_threshold=10.0)],
    )


def prompt_before_padding(**arguments: Any) -> Trainer:
    """A learned prompt, and rows that are padded on the left, behind it."""
    trainer = adapters.prompt(**arguments)
    trainer.data_collator = collate_left
    return trainer


def best_at_end(**arguments: Any) -> Trainer:
    """The best of several checkpoints is loaded at the end."""
    defaults = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True}
    return built(defaults | arguments | {"save_strategy": "steps"}, eval_dataset=tiny.rows(64)[:8])


def padded_without_mask(**arguments: Any) -> Trainer:
    """Padding behind the rows, and no attention mask: no token sees it."""

    def collate(features: Any) -> Any:
        batch = tiny.collate(features)
        batch.pop("attention_mask")
        return batch

    return built(arguments, collator=collate)


def _in_packs(features: Any, positions: bool) -> Any:
    """Unpadded rows under a mask with a number for each query and key, with padding behind."""
    rows = [features[i : i + 2] for i in range(0, len(features), 2)]
    width = 4 + max(sum(len(f["input_ids"]) for f in pack) for pack in rows)
    ids, labels = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), -100)
    places, sequence = torch.zeros_like(ids), torch.zeros_like(ids)
    for i, pack in enumerate(rows):
        at = 0
        for n, f in enumerate(pack, 1):
            end = at + len(f["input_ids"])
            ids[i, at:end] = torch.tensor(f["input_ids"])
            labels[i, at:end] = torch.tensor(f["labels"])
            labels[i, at] = -100
            places[i, at:end] = torch.arange(end - at)
            sequence[i, at:end] = n
            at = end
    seen = (sequence[:, :, None] == sequence[:, None]) & torch.ones(width, width, dtype=torch.bool).tril()
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None]
    batch = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    return batch | {"position_ids": places} if positions else batch


def packs(**arguments: Any) -> Trainer:
    """Packs that a mask keeps apart, with rotary positions that run on."""
    return built(arguments, collator=lambda features: _in_packs(features, positions=False))


def packs_with_positions(**arguments: Any) -> Trainer:
    """Packs that a mask keeps apart, with positions that begin anew, on learned positions."""
    return built(arguments, **_GPT2, collator=lambda features: _in_packs(features, positions=True))


def packs_that_see_each_other(**arguments: Any) -> Trainer:
    """Not healthy: the mask is that of packs, and learned positions run on over them."""
    return built(arguments, **_GPT2, collator=lambda features: _in_packs(features, positions=False))


def leaking_packs(**arguments: Any) -> Trainer:
    """Not healthy: positions begin anew, and the mask lets sequences see those before them."""

    def collate(features: Any) -> Any:
        batch = _in_packs(features, positions=True)
        width = batch["input_ids"].shape[1]
        seen = torch.ones(width, width, dtype=torch.bool).tril()
        mask = torch.zeros(width, width).masked_fill(~seen, torch.finfo(torch.float32).min)
        batch["attention_mask"] = mask.expand(len(batch["input_ids"]), 1, width, width).clone()
        return batch

    return built(arguments, collator=collate)


def prefix_mask(**arguments: Any) -> Trainer:
    """A prefix language model: the prompt sees all of itself, by a mask of its own."""

    def collate(features: Any) -> Any:
        batch = tiny.collate(features)
        width = batch["input_ids"].shape[1]
        prompt = (batch["labels"] == -100).long().cumprod(-1).bool()
        seen = torch.ones(width, width, dtype=torch.bool).tril() | (prompt[:, :, None] & prompt[:, None])
        seen = seen & batch["attention_mask"].bool()[:, None] | torch.eye(width, dtype=torch.bool)
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        return batch | {"attention_mask": mask[:, None]}

    return built(arguments, collator=collate)


def one_square_row(**arguments: Any) -> Trainer:
    """Each micro-batch is one whole row under a causal mask of its own."""

    def collate(features: Any) -> Any:
        width = max(len(f["input_ids"]) for f in features)
        seen = torch.ones(width, width, dtype=torch.bool).tril()
        mask = torch.zeros(width, width).masked_fill(~seen, torch.finfo(torch.float32).min)
        return tiny.collate(features) | {"attention_mask": mask.expand(len(features), 1, width, width).clone()}

    return built(arguments, **_GPT2, collator=collate)


def padding_is_the_end(**arguments: Any) -> Trainer:
    """The end token also pads, as many tokenizers have it, on a base whose row for it is zero."""
    config = LlamaConfig(**SMALL | {"pad_token_id": 2}, tie_word_embeddings=False)
    return built(arguments, config=config)


def partly_frozen_adapter(**arguments: Any) -> Trainer:
    """A second adapter is used, and not trained."""

    def wrap(model: Any) -> Any:
        second = copy.deepcopy(model.peft_config["default"])
        model.add_adapter("second", second)
        return model

    return built(arguments, wrap=wrap)


_GPT2: dict[str, Any] = {
    "config": GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2, pad_token_id=0
    ),
    "lora": {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
}


def _replaced(base: Any, around: Any) -> Any:
    for layer in base.model.layers:
        layer.mlp = around(layer.mlp)
    return base
