"""Trainings for the properties that are watched at no cost: faults of each, beside what is like them and sound."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler
from transformers import (
    AutoModelForTokenClassification,
    BertConfig,
    LlamaConfig,
    Trainer,
    TrainerCallback,
    ViTConfig,
    set_seed,
)

from pytest_sftguard.engine.models import tiny
from tests.targets.faulty import At, on, parameters
from tests.targets.healthy import BERT, SMALL, built

# the step goes downhill


def maximised(**arguments: Any) -> Trainer:
    """The optimizer maximises."""
    trainer = built(arguments)
    trainer.optimizer = torch.optim.AdamW(parameters(trainer), lr=1e-3, maximize=True)
    return trainer


def negated_before_the_step(**arguments: Any) -> Trainer:
    """A callback negates the gradients, whose norm stays."""
    trainer = built(arguments)
    return on(
        trainer,
        "on_pre_optimizer_step",
        lambda: [p.grad.neg_() for p in parameters(trainer) if p.grad is not None],
        None,
    )


def one_tensor_negated(**arguments: Any) -> Trainer:
    """The same with the gradient of a single factor."""
    trainer = built(arguments)
    return on(trainer, "on_pre_optimizer_step", lambda: parameters(trainer, "lora_B")[4].grad.neg_(), None)


class _Adds(torch.optim.Optimizer):
    """Adds the gradient to the weights."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 1e-2})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(group["lr"] * p.grad)


def optimizer_adds(**arguments: Any) -> Trainer:
    """An optimizer of one's own with the wrong sign."""
    trainer = built(arguments)
    trainer.optimizer = _Adds(parameters(trainer))
    return trainer


def momentum_brought_along(**arguments: Any) -> Trainer:
    """An optimizer with the momentum of another training, which pulls uphill."""
    trainer = built(arguments)
    trainer.optimizer = torch.optim.SGD(parameters(trainer), lr=1e-2, momentum=0.9)
    for p in parameters(trainer):
        trainer.optimizer.state[p]["momentum_buffer"] = torch.ones_like(p)
    return trainer


# the loss is computed in float32


class _OwnLoss(Trainer):
    """Cross-entropy in one's own code, in a type of one's own."""

    dtype = torch.bfloat16
    divided = False

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        labels = inputs.pop("labels")[:, 1:].flatten()
        outputs = model(**inputs)
        logits = outputs.logits[:, :-1].to(self.dtype).flatten(0, 1)
        reduction = "sum" if self.divided else "mean"
        with torch.autocast(logits.device.type, enabled=False):
            loss = nn.functional.cross_entropy(logits, labels, reduction=reduction)
        loss = loss.float() / (labels != -100).sum() if self.divided else loss
        return (loss, outputs) if return_outputs else loss


def loss_in_bfloat16(**arguments: Any) -> Trainer:
    """The softmax and the mean are in bfloat16."""
    return built(arguments, trainer_class=_OwnLoss)


def loss_cast_late(**arguments: Any) -> Trainer:
    """The loss is computed in float16, and returned as float32."""

    class Own(_OwnLoss):
        dtype = torch.float16

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs).float()

    return built(arguments, trainer_class=Own)


def sum_in_bfloat16(**arguments: Any) -> Trainer:
    """The sum over the tokens is in bfloat16, and divided by their number in float32."""

    class Own(_OwnLoss):
        divided = True

    return built(arguments, trainer_class=Own)


# the cell is what it says


def _loader(trainer: Trainer, **more: Any) -> DataLoader:
    options = {"batch_size": trainer.args.per_device_train_batch_size, "shuffle": True} | more
    return DataLoader(trainer.train_dataset, collate_fn=trainer.data_collator, **options)


def two_rows_always(**arguments: Any) -> Trainer:
    """The batch size of the data loader is written into the code."""

    class Own(Trainer):
        def get_train_dataloader(self) -> DataLoader:
            return _loader(self, batch_size=2)

    return built(arguments, trainer_class=Own)


def collator_drops_rows(**arguments: Any) -> Trainer:
    """The collator keeps half of the rows."""
    return built(arguments, collator=lambda rows: tiny.collate(rows[: max(1, len(rows) // 2)]))


def pairs_in_one_batch(**arguments: Any) -> Trainer:
    """Each row of the data set becomes two rows of the micro-batch, as in preference training: sound."""
    return built(
        arguments, collator=lambda rows: tiny.collate([*rows, *({**r, "labels": r["input_ids"]} for r in rows)])
    )


# rows are seen as often as they should


class _Rows(IterableDataset):
    """A stream that does not ask which worker it is in."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        yield from self.rows


def stream_in_two_workers(**arguments: Any) -> Trainer:
    """Both workers deliver the whole stream."""
    return built(arguments | {"dataloader_num_workers": 2}, dataset=_Rows(tiny.rows(64)))


def stream_with_repeats(**arguments: Any) -> Trainer:
    """A stream that has each row twice, on purpose: sound."""
    return built(arguments, dataset=_Rows([row for row in tiny.rows(64) for _ in range(2)]))


class _Twice(DataLoader):
    """Yields each batch twice."""

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            yield batch
            yield {k: v.clone() for k, v in batch.items()}

    def __len__(self) -> int:
        return 2 * super().__len__()


def served_twice(**arguments: Any) -> Trainer:
    """A data loader that yields each batch twice."""

    class Own(Trainer):
        def get_train_dataloader(self) -> DataLoader:
            size = self.args.per_device_train_batch_size
            return _Twice(self.train_dataset, collate_fn=self.data_collator, batch_size=size, shuffle=True)

    return built(arguments, trainer_class=Own)


def stale_batch(**arguments: Any) -> Trainer:
    """Every second micro-batch is the one before."""

    class Own(Trainer):
        before: Any = None

        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            inputs, self.before = (dict(self.before), None) if self.before else (inputs, dict(inputs))
            return super().training_step(model, inputs, *args, **kwargs)

    return built(arguments, trainer_class=Own)


def drawn_with_replacement(**arguments: Any) -> Trainer:
    """A sampler with replacement: sound."""

    class Own(Trainer):
        def get_train_dataloader(self) -> DataLoader:
            sampler = RandomSampler(self.train_dataset, replacement=True)
            return _loader(self, shuffle=None, sampler=sampler)

    return built(arguments, trainer_class=Own, dataset=tiny.rows(64)[:12])


def duplicates_in_the_data(**arguments: Any) -> Trainer:
    """A data set that has each row four times: sound."""
    return built(arguments, dataset=tiny.rows(64)[:16] * 4)


def masked_anew(**arguments: Any) -> Trainer:
    """A collator that masks other labels each time, over a data set with duplicates: sound."""
    generator = random.Random(0)

    def collate(rows: list[Any]) -> Any:
        return tiny.collate(
            [r | {"labels": [x if generator.random() < 0.8 else -100 for x in r["labels"]]} for r in rows]
        )

    return built(arguments, collator=collate, dataset=tiny.rows(64)[:16] * 4)


def pictures(**arguments: Any) -> Trainer:
    """An image classifier over pictures, served once: sound."""
    return _pictures(arguments, Trainer)


def pictures_served_twice(**arguments: Any) -> Trainer:
    """The same with every batch twice."""

    class Own(Trainer):
        def get_train_dataloader(self) -> DataLoader:
            size = self.args.per_device_train_batch_size
            return _Twice(self.train_dataset, collate_fn=self.data_collator, batch_size=size, shuffle=True)

    return _pictures(arguments, Own)


def _pictures(arguments: dict[str, Any], trainer_class: Any) -> Trainer:
    from transformers import AutoModelForImageClassification

    config = ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=8, patch_size=4
    )
    generator = torch.Generator().manual_seed(0)
    rows = [{"pixel_values": torch.randn(3, 8, 8, generator=generator), "labels": i % 2} for i in range(64)]

    def collate(rows: list[Any]) -> Any:
        pixels = torch.stack([r["pixel_values"] for r in rows])
        return {"pixel_values": pixels, "labels": torch.tensor([r["labels"] for r in rows])}

    lora = {"task_type": None, "target_modules": ["q_proj", "v_proj"]}
    return built(
        arguments,
        config=config,
        auto=AutoModelForImageClassification,
        lora=lora,
        dataset=rows,
        collator=collate,
        trainer_class=trainer_class,
    )


# supervised places are attended places


def _relabelled(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[..., Any]:
    def collate(rows: list[Any]) -> Any:
        batch = tiny.collate(rows)
        change(batch)
        return batch

    return collate


def padding_supervised(**arguments: Any) -> Trainer:
    """The labels are the ids, those of the padding too."""
    return built(arguments, collator=_relabelled(lambda b: b.update(labels=b["input_ids"].clone())))


def padding_supervised_without_a_mask(**arguments: Any) -> Trainer:
    """The same in a batch without an attention mask."""

    def change(batch: dict[str, torch.Tensor]) -> None:
        batch["labels"] = batch["input_ids"].clone()
        del batch["attention_mask"]

    return built(arguments, collator=_relabelled(change))


def mask_with_holes(**arguments: Any) -> Trainer:
    """The mask hides every fifth token of each row."""

    def change(batch: dict[str, torch.Tensor]) -> None:
        batch["attention_mask"] = batch["attention_mask"].clone()
        batch["attention_mask"][:, 4::5] = 0

    return built(arguments, collator=_relabelled(change))


def mask_shifted(**arguments: Any) -> Trainer:
    """The mask begins two places late, and ends as late in the padding."""
    return built(arguments, collator=_relabelled(lambda b: b.update(attention_mask=b["attention_mask"].roll(2, 1))))


def end_token_masked(**arguments: Any) -> Trainer:
    """The mask is `ids != pad` where the pad token ends each row, whose label counts: sound."""

    def change(batch: dict[str, torch.Tensor]) -> None:
        batch["attention_mask"] = batch["attention_mask"] * (batch["input_ids"] != 2)

    return built(arguments, collator=_relabelled(change))


def tokens_classified(**arguments: Any) -> Trainer:
    """A token classifier with labels for its tokens alone: sound."""
    return _tokens(arguments, lambda batch: None)


def tokens_classified_on_padding(**arguments: Any) -> Trainer:
    """The same with labels on the padding."""
    return _tokens(arguments, lambda batch: batch["labels"].masked_fill_(batch["labels"] == -100, 0))


def _tokens(arguments: dict[str, Any], change: Callable[[dict[str, torch.Tensor]], Any]) -> Trainer:
    rows = [r | {"labels": [i % 3 for i in r["input_ids"]]} for r in tiny.rows(64)]
    return built(
        arguments,
        config=BertConfig(**BERT),
        auto=AutoModelForTokenClassification,
        lora={"task_type": "TOKEN_CLS", "target_modules": ["query", "value"]},
        dataset=rows,
        collator=_relabelled(change),
    )


# an adapter that no token reaches is dead


class _ReadsPast(Trainer):
    """A fused loss, which multiplies by the head's weight itself."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        labels = inputs.pop("labels")[:, 1:]
        inner = self.accelerator.unwrap_model(model).base_model.model
        hidden = inner.model(**inputs).last_hidden_state
        logits = (hidden[:, :-1] @ inner.lm_head.weight.T.to(hidden.dtype)).float()
        total = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        count = kwargs.get("num_items_in_batch")
        return total / ((labels != -100).sum() if count is None else count)


def head_read_past(**arguments: Any) -> Trainer:
    """LoRA on the head, whose weight is read past the layer."""
    return built(arguments, trainer_class=_ReadsPast, lora={"target_modules": ["q_proj", "v_proj", "lm_head"]})


def plain_head_read_past(**arguments: Any) -> Trainer:
    """The same loss without LoRA on the head: sound."""
    return built(arguments, trainer_class=_ReadsPast, lora={"target_modules": ["q_proj", "v_proj"]})


class _Branch(nn.Module):
    """A tower beside the layer, which batches of some lengths go through."""

    def __init__(self, layer: nn.Module, width: int, every: int) -> None:
        super().__init__()
        self.layer, self.tower, self.every = layer, nn.Linear(width, width), every

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(hidden)
        return out + 0.1 * self.tower(hidden) if self.every and hidden.shape[1] % self.every == 1 else out


def _branched(arguments: dict[str, Any], every: int) -> Trainer:
    def prepare(base: Any) -> Any:
        base.model.layers[0].mlp = _Branch(base.model.layers[0].mlp, 32, every)
        return base

    return built(arguments, prepare=prepare, lora={"target_modules": ["q_proj", "v_proj", "tower"]})


def branch_never_taken(**arguments: Any) -> Trainer:
    """LoRA on a tower that no input goes through, as images that the data lacks."""
    return _branched(arguments, 0)


def branch_taken_at_times(**arguments: Any) -> Trainer:
    """A tower that micro-batches of an odd length go through: sound."""
    return _branched(arguments, 2)


# randomness


class _Evaluating(Trainer):
    """Calls model.eval() before the loss."""

    def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        model.eval()
        return super().compute_loss(model, *args, **kwargs)


def evaluation_mode(**arguments: Any) -> Trainer:
    """compute_loss calls model.eval()."""
    return built(arguments, trainer_class=_Evaluating, lora={"lora_dropout": 0.1})


def attention_dropout_off(**arguments: Any) -> Trainer:
    """The same where the attention alone has dropout."""
    config = LlamaConfig(**SMALL, attention_dropout=0.1, tie_word_embeddings=False)
    return built(arguments, config=config, trainer_class=_Evaluating)


def dropout_set_to_zero(**arguments: Any) -> Trainer:
    """A callback sets the probability of the adapter's dropout to zero."""

    class Own(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for module in kwargs["model"].modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0

    return built(arguments, lora={"lora_dropout": 0.1}, callbacks=[Own()])


def seeded_in_every_step(**arguments: Any) -> Trainer:
    """Each step sets the seed of the first."""
    trainer = built(arguments, lora={"lora_dropout": 0.1})
    return on(trainer, "on_step_begin", lambda: set_seed(3), None)


def seeded_in_every_micro_batch(**arguments: Any) -> Trainer:
    """Each micro-batch has the seed of its step."""

    class Own(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            torch.manual_seed(self.state.global_step)
            return super().compute_loss(*args, **kwargs)

    return built(arguments, trainer_class=Own, lora={"lora_dropout": 0.1})


def seeded_by_step(**arguments: Any) -> Trainer:
    """Each step has a seed of its own: sound."""
    trainer = built(arguments, lora={"lora_dropout": 0.1})
    return on(trainer, "on_step_begin", lambda: set_seed(3 + trainer.state.global_step), None)


def base_in_evaluation_mode(**arguments: Any) -> Trainer:
    """The frozen base's own dropout is off on purpose, the adapter's is on: sound."""
    config = BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
    )
    rows = [r | {"labels": [i % 2 for i in r["input_ids"]]} for r in tiny.rows(64)]

    class Own(Trainer):
        def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            for name, module in model.named_modules():
                if isinstance(module, nn.Dropout) and "lora_dropout" not in name:
                    module.eval()
            return super().compute_loss(model, *args, **kwargs)

    return built(
        arguments,
        config=config,
        auto=AutoModelForTokenClassification,
        trainer_class=Own,
        lora={"task_type": "TOKEN_CLS", "target_modules": ["query", "value"], "lora_dropout": 0.1},
        dataset=rows,
    )


# the model during training is the model before and after


def rotary_changed_within(**arguments: Any) -> Trainer:
    """Rotary frequencies that are halved for the training alone."""
    trainer = built(arguments)
    buffers = [b for n, b in trainer.model.named_buffers(remove_duplicate=False) if "inv_freq" in n]
    held = list({id(b): b for b in buffers}.values())
    trainer.add_callback(At("on_train_begin", lambda: [b.mul_(0.5) for b in held], None))
    trainer.add_callback(At("on_train_end", lambda: [b.mul_(2.0) for b in held], None))
    return trainer


def weight_changed_midway(**arguments: Any) -> Trainer:
    """A base weight that is doubled from the second step to the end."""
    trainer = built(arguments)
    weight = next(p for n, p in trainer.model.named_parameters() if "layers.1.mlp.down_proj.base_layer" in n)
    on(trainer, "on_step_end", lambda control: weight.data.mul_(2), 2)
    trainer.add_callback(At("on_train_end", lambda: weight.data.div_(2), None))
    return trainer
