"""Generated trainings: `pytest_sftguard.engine.generated.trainings:draw_17_42` is the one with number 42 of seed 17."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from torch import Tensor
from torch.nn import functional
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from pytest_sftguard.engine.generated import architectures, tasks
from pytest_sftguard.engine.generated.axes import (
    ARCHITECTURES,
    CAUSAL,
    CLASSIFY,
    IMAGES,
    MASKED,
    PROMPTS,
    SEQ2SEQ,
    SPEECH,
    TAG,
    Healthy,
    compose,
)
from pytest_sftguard.engine.surroundings.isolation import isolated

_TYPES = {
    CAUSAL: "CAUSAL_LM",
    CLASSIFY: "SEQ_CLS",
    TAG: "TOKEN_CLS",
    MASKED: None,
    SEQ2SEQ: "SEQ_2_SEQ_LM",
    IMAGES: None,
    SPEECH: None,
}
"""The name of each task in peft."""
_RANK = 4
_VIRTUAL = 4
_ROWS = [5, 6, 7]
_SMOOTHING = 0.1


def path_of(training: Healthy) -> str:
    """The dotted path of the function that builds the Trainer of `training`."""
    return f"{__name__}:draw_{training.seed}_{training.number}"


def __getattr__(name: str) -> Callable[..., Trainer]:
    found = re.fullmatch(r"draw_(\d+)_(\d+)", name)
    if found is None:
        raise AttributeError(name)
    return functools.partial(built, compose(int(found[1]), int(found[2])))


def built(training: Healthy, *, model: str | None = None, dtype: str = "float32", **training_arguments: Any) -> Trainer:
    """Build a Trainer of `training`: its base comes from a fixed seed, adapter and order of rows from `seed`."""
    dropout = 0.1 if "dropout" in training.extras else 0.0
    base = architectures.made(training.architecture, training.task, getattr(torch, dtype), training.attention, dropout)
    arguments = TrainingArguments(**{**_arguments(training), **training_arguments})
    set_seed(arguments.seed)
    adapted = _adapted(training, base, arguments.max_steps)
    start = getattr(base.config, "decoder_start_token_id", None)
    positions = ARCHITECTURES[training.architecture].counts_padding
    collate = tasks.collate(training.task, training.collator, start, getattr(torch, dtype), positions=positions)
    # the Trainer divides the loss of other classes, such as GPT-2's, by labels that nothing predicts, too
    rows = tasks.rows(training.task, training.collator, first=getattr(base, "loss_type", None) == "ForCausalLM")
    smoothing = _SMOOTHING if "label smoothing" in training.extras else 0.0
    trainer = Trainer(
        model=adapted,
        args=arguments,
        train_dataset=rows,
        data_collator=collate,
        # a loss that does not count the labels of all micro-batches is none that can be accumulated
        compute_loss_func=_Loss(training.task, smoothing)
        if smoothing or not _counts(base, training.task, collate(rows[:2]))
        else None,
        optimizers=(_optimizer(training, adapted, arguments), None),
    )
    if training.adapter == "adalora":
        trainer.add_callback(_Allocate(adapted))
    return trainer


def _arguments(training: Healthy) -> dict[str, Any]:
    """TrainingArguments of a training, below those that the caller gives."""
    extras = training.extras
    schedule = {
        "linear with warm-up": {"lr_scheduler_type": "linear", "warmup_steps": 2},
        "constant_with_warmup": {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2},
    }.get(training.schedule, {"lr_scheduler_type": training.schedule})
    optimizer = {"optim": training.optimizer}
    if training.optimizer == "sgd with momentum":
        optimizer = {"optim": "sgd", "optim_args": "momentum=0.9"}
    checkpointing = {}
    if {"checkpointing", "re-entrant checkpointing"} & set(extras):
        reentrant = "checkpointing" not in extras
        checkpointing = {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
        }
    return {
        "learning_rate": training.rate,
        "weight_decay": 0.1 if "weight decay" in extras else 0.0,
        "max_grad_norm": 0.0 if "no clipping" in extras else 0.1 if "clipping" in extras else 1.0,
        "neftune_noise_alpha": 5.0 if "NEFTune" in extras else None,
        "remove_unused_columns": False,
        **schedule,
        **optimizer,
        **checkpointing,
    }


def _adapted(training: Healthy, base: Any, steps: int) -> Any:
    """`base` with the adapter of `training`, or as it is."""
    architecture, task_type = ARCHITECTURES[training.architecture], _TYPES[training.task]
    targets: Any = list(architecture.targets) or _linear(base)
    # peft adds the head of a classification by its task; elsewhere it is asked for
    heads = {"modules_to_save": ["classifier"]} if training.task == IMAGES else {}
    if training.task == CAUSAL and training.adapter == "lora and head":
        heads = {"modules_to_save": [_head(base)]}
    lora: dict[str, Any] = {"r": _RANK, "lora_alpha": 2 * _RANK, "target_modules": targets, "task_type": task_type}
    weights = {"target_modules": targets, "task_type": task_type}
    virtual = {"num_virtual_tokens": _VIRTUAL, "task_type": task_type}
    configs: dict[str, Callable[[], Any]] = {
        "none": lambda: None,
        "rslora": lambda: LoraConfig(**lora, **heads, use_rslora=True),
        "dora": lambda: LoraConfig(**lora, **heads, use_dora=True),
        "pissa": lambda: LoraConfig(**lora, **heads, init_lora_weights="pissa"),
        "olora": lambda: LoraConfig(**lora, **heads, init_lora_weights="olora"),
        "lora with dropout": lambda: LoraConfig(**lora, **heads, lora_dropout=0.1),
        "lora and token rows": lambda: LoraConfig(**lora, **heads, trainable_token_indices=_ROWS),
        "adalora": lambda: AdaLoraConfig(
            **{**weights, **heads},
            init_r=6,
            target_r=_RANK,
            lora_alpha=12,
            tinit=1,
            tfinal=1,
            deltaT=2,
            total_step=steps,
        ),
        "loha": lambda: LoHaConfig(**weights, **heads, r=_RANK, alpha=2 * _RANK),
        "lokr": lambda: LoKrConfig(**weights, **heads, r=_RANK, alpha=2 * _RANK),
        "vera": lambda: VeraConfig(**weights, **heads, r=16),
        "oft": lambda: OFTConfig(**weights, **heads, r=0, oft_block_size=4),
        "ia3": lambda: IA3Config(
            target_modules=[*architecture.scaled, *architecture.scaled_inputs],
            feedforward_modules=list(architecture.scaled_inputs),
            task_type=task_type,
            **heads,
        ),
        "prefix": lambda: PrefixTuningConfig(**virtual),
        "prompt": lambda: PromptTuningConfig(**virtual),
        "p-tuning": lambda: PromptEncoderConfig(**virtual, encoder_hidden_size=32),
    }
    # the other names differ from plain LoRA in what is done around it
    config = configs.get(training.adapter, lambda: LoraConfig(**lora, **heads))()
    if config is None:
        return base
    # checkpointed layers of a frozen base need an input that requires a gradient
    if "re-entrant checkpointing" in training.extras and training.adapter not in PROMPTS:
        base.enable_input_require_grads()
    return get_peft_model(base, config)


def _linear(base: Any) -> str:
    """A pattern of every linear module but the head, as `all-linear` is for models whose task peft knows."""
    from transformers.pytorch_utils import Conv1D

    heads = {"lm_head", "classifier", "score", "decoder", "proj_out", "embed_out", "generator_lm_head"}
    heads |= {"vocab_projector", "qa_outputs", "pre_classifier", "gate", "shared_expert_gate"}
    names = {
        name.rpartition(".")[2]
        for name, module in base.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and "head" not in name and "classifier" not in name
    }
    return rf".*\.({'|'.join(sorted(names - heads))})"


def _head(base: Any) -> str:
    """The name of the output layer."""
    head = base.get_output_embeddings()
    path: str = next(name for name, module in base.named_modules() if module is head)
    return path.rpartition(".")[2]


def _optimizer(training: Healthy, model: Any, arguments: TrainingArguments) -> Any:
    """An optimizer that peft makes; None where the Trainer makes it."""
    if training.adapter == "lora-fa":
        return create_lorafa_optimizer(model=model, r=_RANK, lora_alpha=2 * _RANK, lr=arguments.learning_rate)
    if training.adapter == "lora+":
        return create_loraplus_optimizer(
            model=model, optimizer_cls=torch.optim.AdamW, lr=arguments.learning_rate / 4, loraplus_lr_ratio=4.0
        )
    return None


def _counts(base: Any, task: str, batch: dict[str, Tensor]) -> bool:
    """Whether the loss of `base` is divided by the labels of all micro-batches, whose number the Trainer hands over."""
    training = base.training
    base.eval()
    try:
        with isolated(), torch.no_grad():
            losses = [float(base(**batch, **more).loss) for more in ({}, {"num_items_in_batch": 1})]
    except TypeError:
        return False
    finally:
        base.train(training)
    return losses[0] != losses[1]


class _Loss:
    """Cross-entropy over the labels of all micro-batches, for models whose own loss does not count them."""

    def __init__(self, task: str, smoothing: float) -> None:
        self.shifts, self.smoothing = task == CAUSAL, smoothing

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        """The loss, a scalar."""
        logits = outputs["logits"].float()
        if self.shifts:
            logits, labels = logits[:, -labels.shape[1] :][:, :-1], labels[:, 1:]
        losses = functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]),
            labels.reshape(-1),
            ignore_index=tasks.IGNORED,
            label_smoothing=self.smoothing,
            reduction="sum",
        )
        return losses / (num_items_in_batch if num_items_in_batch is not None else (labels != tasks.IGNORED).sum())


# transformers types its callbacks as Any
class _Allocate(TrainerCallback):  # type: ignore[misc]
    """Lets AdaLoRA allocate its ranks after each step, as its documentation asks for."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The gradients are still there."""
        self.model.base_model.update_and_allocate(state.global_step + 1)
