"""Faults in how adapter, base, optimizer and precision are put together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import Trainer

from pytest_sftguard.engine.faults._adapting import adapting, without_head
from pytest_sftguard.engine.faults._collating import collating, in_prompt
from pytest_sftguard.engine.faults._training import wrap
from pytest_sftguard.engine.faults.fault import Fault


class CheckpointingMasksFrozenAdapter(Fault):
    """A loaded adapter is not trainable; under gradient checkpointing the backward pass works, and nothing trains."""

    source = "https://github.com/huggingface/trl/issues/6700"
    injects = "freezes the adapter, as from_pretrained does without is_trainable, and checkpoints gradients"
    reported_by = ("trainable_set_exact", "optimizer_owns_trainables", "every_factor_moves")
    mechanism = "adapter_frozen"
    tensor = "lora_"

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        arguments |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
        with adapting(lambda base, config: setattr(config, "inference_mode", True)):
            trainer = build(**arguments)
        trainer.model.enable_input_require_grads()
        return trainer


class OptimizerDoesNotOwnAdapter(Fault):
    """The optimizer was made before the adapter: the loss looks healthy, and nothing ever moves."""

    source = "https://github.com/huggingface/peft/issues/793"
    injects = "makes the optimizer, AdamW(base.parameters()), before get_peft_model"
    reported_by = ("optimizer_owns_trainables", "every_factor_moves")
    mechanism = "adapter_not_in_optimizer"
    tensor = "lora_"

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        before: list[Any] = []
        with adapting(lambda base, config: before.extend(base.parameters())):
            trainer = build(**arguments)
        trainer.optimizer = torch.optim.AdamW(before, lr=trainer.args.learning_rate)
        return trainer


class ZeroShardedAdapterNotUpdated(Fault):
    """The optimizer's updates never reach the adapter: they are applied to another copy, or dropped."""

    source = "https://github.com/huggingface/peft/issues/1402"
    injects = "skips optimizer.step, as a sharded optimizer does if its shards lack the adapter"
    reported_by = ("every_factor_moves", "effective_steps")
    mechanism = "adapter_not_in_optimizer"

    def alter(self, trainer: Trainer) -> None:
        def create(create_optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            optimizer = create_optimizer(*args, **kwargs)
            optimizer.step = lambda closure=None: None
            return optimizer

        wrap(trainer, "create_optimizer", create)


class BaseNotFrozen(Fault):
    """The base is trained too, and the adapter's file does not hold what it learned."""

    source = "https://github.com/huggingface/peft/issues/2759"
    injects = "sets requires_grad on every floating-point tensor of the model"
    reported_by = ("base_bit_frozen", "trainable_set_exact", "round_trip")
    mechanism = "base_not_frozen"
    tensor = "base_model"

    def alter(self, trainer: Trainer) -> None:
        for parameter in trainer.model.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(True)


class BNotZeroAtInit(Fault):
    """Both factors start at random, so that the adapter disturbs the base before it has learned anything."""

    source = "https://github.com/hao-ai-lab/FastVideo/pull/781"
    injects = "sets init_lora_weights=False"
    reported_by = ("identity_at_init",)
    mechanism = "adapter_perturbs_the_base"
    tensor = "lora_B"

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        with adapting(lambda base, config: setattr(config, "init_lora_weights", False)):
            return build(**arguments)


class NewTokenRowsUntrained(Fault):
    """The embedding rows of tokens added for the task are frozen, in no file, and drawn anew by each machine."""

    source = "https://github.com/hiyouga/LlamaFactory/pull/10547"
    injects = "resizes the embedding by 6 rows before get_peft_model, and puts one of the new ids into every row"
    reported_by = ("round_trip",)
    mechanism = "base_not_reproducible"
    tensor = "embed"

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        new: list[int] = []

        def grow(base: Any, config: Any) -> None:
            without_head(base, config)
            old = base.get_input_embeddings().num_embeddings
            with torch.random.fork_rng():
                torch.manual_seed(int(arguments.get("seed", 0)) + 1)
                base.resize_token_embeddings(old + 6, mean_resizing=False)
            new.append(old + 1)

        with adapting(grow):
            trainer = build(**arguments)
        # peft saves the new rows if it knows the vocabulary of the original base
        for config in trainer.model.peft_config.values():
            config.base_model_name_or_path = None

        def use(batch: Any) -> None:
            last_of_prompt = in_prompt(batch).int().cumsum(1).argmax(1)
            batch["input_ids"][range(len(last_of_prompt)), last_of_prompt] = new[0]

        collating(trainer, use)
        return trainer


class DefaultDtypeIsCheckpointDtype(Fault):
    """transformers 5 loads in the checkpoint's dtype: what was float32 by default is trained in half precision."""

    source = "https://github.com/huggingface/sentence-transformers/pull/3773"
    injects = "loads the base in bfloat16 in a float32 cell, and puts the head into modules_to_save"
    reported_by = ("fp32_master", "precision_is_real")
    mechanism = "trainables_in_the_checkpoints_type"
    tensor = "modules_to_save"

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        def save_head(base: Any, config: Any) -> None:
            config.modules_to_save = [*(config.modules_to_save or ()), *without_head(base, config)]

        with adapting(save_head):
            return build(**arguments | {"dtype": "bfloat16"})


class Fp16FlagIgnoredOnCpu(Fault):
    """fp16 was asked for, and float32 is trained while every label says fp16."""

    source = "https://github.com/bmaltais/kohya_ss/issues/255"
    injects = "removes autocast and loss scaler, as accelerate does on a CPU, and leaves the label fp16"
    reported_by = ("precision_is_real",)
    mechanism = "precision_not_applied"
    precision = "fp16-mixed"

    def alter(self, trainer: Trainer) -> None:
        trainer.accelerator.native_amp, trainer.accelerator.scaler = False, None
        # The guard repairs float16 on a CPU where this argument asks for it
        trainer.args.fp16 = False
