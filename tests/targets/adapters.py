"""Healthy trainings with every adapter that peft has for a language model, and with none at all.

Each function is a target of its own: the tiny model of `healthy.py` with one way to make it trainable.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import (
    AdaLoraConfig,
    BOFTConfig,
    C3AConfig,
    CPTConfig,
    FourierFTConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    RandLoraConfig,
    RoadConfig,
    ShiraConfig,
    TrainableTokensConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
)
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

from pytest_sftguard.engine.models import tiny
from tests.targets.healthy import SMALL

CAUSAL: dict[str, Any] = {"task_type": "CAUSAL_LM"}
PROJECTIONS: dict[str, Any] = CAUSAL | {"target_modules": ["q_proj", "v_proj"]}


def built(arguments: dict[str, Any], wrap: Callable[[Any, TrainingArguments], Any], **defaults: Any) -> Trainer:
    """A Trainer of the tiny model after `wrap`; `defaults` are TrainingArguments unless the cell has others."""
    arguments = {"learning_rate": 1e-3, "lr_scheduler_type": "constant"} | defaults | arguments
    arguments.pop("model")
    dtype = getattr(torch, arguments.pop("dtype"))
    set_seed(0)
    config = LlamaConfig(**SMALL, tie_word_embeddings=False, initializer_range=0.1)
    base = tiny.in_dtype(LlamaForCausalLM(config), dtype)
    given = TrainingArguments(**arguments)
    set_seed(given.seed)
    return Trainer(model=wrap(base, given), args=given, train_dataset=tiny.rows(64), data_collator=tiny.collate)


def _with(config: Any) -> Callable[[Any, TrainingArguments], Any]:
    return lambda base, given: get_peft_model(base, config)


def lora(**arguments: Any) -> Trainer:
    """LoRA."""
    return built(arguments, _with(LoraConfig(**PROJECTIONS, r=4)))


def dora(**arguments: Any) -> Trainer:
    """LoRA with magnitudes beside the factors."""
    return built(arguments, _with(LoraConfig(**PROJECTIONS, r=4, use_dora=True)))


def rslora(**arguments: Any) -> Trainer:
    """LoRA scaled by the root of the rank."""
    return built(arguments, _with(LoraConfig(**PROJECTIONS, r=4, use_rslora=True)))


def pissa(**arguments: Any) -> Trainer:
    """LoRA that starts at the base's principal components."""
    return built(arguments, _with(LoraConfig(**PROJECTIONS, r=4, init_lora_weights="pissa")))


def olora(**arguments: Any) -> Trainer:
    """LoRA that starts at orthonormal factors of the base."""
    return built(arguments, _with(LoraConfig(**PROJECTIONS, r=4, init_lora_weights="olora")))


def lora_plus(**arguments: Any) -> Trainer:
    """LoRA+: lora_B learns faster than lora_A."""
    from peft.optimizers import create_loraplus_optimizer

    trainer = lora(**arguments)
    trainer.optimizer = create_loraplus_optimizer(
        trainer.model, torch.optim.AdamW, lr=trainer.args.learning_rate, loraplus_lr_ratio=16
    )
    return trainer


def lora_fa(**arguments: Any) -> Trainer:
    """LoRA-FA: its optimizer freezes every lora_A."""
    from peft.optimizers import create_lorafa_optimizer

    trainer = lora(**arguments)
    trainer.optimizer = create_lorafa_optimizer(trainer.model, r=4, lora_alpha=8, lr=trainer.args.learning_rate)
    return trainer


class _Allocates(TrainerCallback):
    """Lets AdaLoRA choose ranks after each backward pass, as its documentation asks."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The gradients are still there."""
        self.model.base_model.update_and_allocate(state.global_step)


def adalora(**arguments: Any) -> Trainer:
    """AdaLoRA whose schedule has not begun: no rank is taken away within the run."""
    return built(arguments, _with(AdaLoraConfig(**PROJECTIONS, init_r=6, target_r=3, total_step=1000, tinit=200)))


def adalora_pruning(**arguments: Any) -> Trainer:
    """AdaLoRA that takes ranks away from the second step on."""
    steps = int(arguments["max_steps"])

    def wrap(base: Any, given: TrainingArguments) -> Any:
        config = AdaLoraConfig(
            **PROJECTIONS, init_r=6, target_r=3, total_step=max(steps, 4), tinit=1, tfinal=1, deltaT=1
        )
        return get_peft_model(base, config)

    trainer = built(arguments, wrap)
    trainer.add_callback(_Allocates(trainer.model))
    return trainer


def loha(**arguments: Any) -> Trainer:
    """Hadamard products."""
    return built(arguments, _with(LoHaConfig(**PROJECTIONS, r=4)))


def lokr(**arguments: Any) -> Trainer:
    """Kronecker products."""
    return built(arguments, _with(LoKrConfig(**PROJECTIONS, r=4)))


def vera(**arguments: Any) -> Trainer:
    """Shared random projections, and vectors that train."""
    return built(arguments, _with(VeraConfig(**PROJECTIONS, r=8)), learning_rate=1e-2)


def vblora(**arguments: Any) -> Trainer:
    """A bank of vectors that all layers share."""
    return built(arguments, _with(VBLoRAConfig(**PROJECTIONS, r=4, num_vectors=16, vector_length=8)))


def randlora(**arguments: Any) -> Trainer:
    """Sums of random bases."""
    return built(arguments, _with(RandLoraConfig(**PROJECTIONS, r=4)))


def oft(**arguments: Any) -> Trainer:
    """Orthogonal blocks."""
    return built(arguments, _with(OFTConfig(**PROJECTIONS, oft_block_size=8)))


def boft(**arguments: Any) -> Trainer:
    """Butterflies of orthogonal blocks."""
    return built(arguments, _with(BOFTConfig(**CAUSAL, target_modules=["q_proj"], boft_block_size=8)))


def hra(**arguments: Any) -> Trainer:
    """Householder reflections."""
    return built(arguments, _with(HRAConfig(**PROJECTIONS, r=4)))


def ia3(**arguments: Any) -> Trainer:
    """Vectors that rescale activations."""
    config = IA3Config(**CAUSAL, target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    return built(arguments, _with(config), learning_rate=1e-2)


def norms(**arguments: Any) -> Trainer:
    """LN tuning: normalisation layers alone."""
    config = LNTuningConfig(**CAUSAL, target_modules=["input_layernorm", "post_attention_layernorm"])
    return built(arguments, _with(config))


def fourier(**arguments: Any) -> Trainer:
    """Sparse spectra of the change."""
    return built(arguments, _with(FourierFTConfig(**PROJECTIONS, n_frequency=64)), learning_rate=1e-1)


def c3a(**arguments: Any) -> Trainer:
    """Circular convolutions."""
    return built(arguments, _with(C3AConfig(**CAUSAL, target_modules=["q_proj"], block_size=8)))


def miss(**arguments: Any) -> Trainer:
    """Shards that share a matrix."""
    return built(arguments, _with(MissConfig(**PROJECTIONS, r=4)))


def road(**arguments: Any) -> Trainer:
    """Rotations of pairs."""
    return built(arguments, _with(RoadConfig(**PROJECTIONS, group_size=8)))


def shira(**arguments: Any) -> Trainer:
    """A sparse set of the base's own weights."""
    return built(arguments, _with(ShiraConfig(**PROJECTIONS, r=4)))


def token_rows(**arguments: Any) -> Trainer:
    """Three rows of the embedding alone."""
    return built(
        arguments, _with(TrainableTokensConfig(**CAUSAL, token_indices=[3, 4, 5], target_modules=["embed_tokens"]))
    )


def prefix(**arguments: Any) -> Trainer:
    """Prefix tuning: keys and values in front of each layer's own."""
    return built(arguments, _with(PrefixTuningConfig(**CAUSAL, num_virtual_tokens=4)), learning_rate=1e-2)


def prefix_projected(**arguments: Any) -> Trainer:
    """Prefix tuning through a small network."""
    config = PrefixTuningConfig(**CAUSAL, num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=16)
    return built(arguments, _with(config))


def prompt(**arguments: Any) -> Trainer:
    """Prompt tuning: embeddings in front of each row."""
    return built(arguments, _with(PromptTuningConfig(**CAUSAL, num_virtual_tokens=4)), learning_rate=1e-2)


def p_tuning(**arguments: Any) -> Trainer:
    """P-tuning: those embeddings through an encoder."""
    config = PromptEncoderConfig(**CAUSAL, num_virtual_tokens=4, encoder_hidden_size=16)
    return built(arguments, _with(config))


def context_prompt(**arguments: Any) -> Trainer:
    """CPT: perturbations of the embeddings of example rows."""
    ids = tiny.rows(64)[0]["input_ids"]
    size = len(ids)
    config = CPTConfig(
        **CAUSAL,
        cpt_token_ids=ids,
        cpt_mask=[1] * size,
        # the last type is that of labels
        cpt_tokens_type_mask=[1, *[2] * (size - 3), 3, 4],
        opt_weighted_loss_type="decay",
        opt_loss_decay_factor=0.95,
        opt_projection_epsilon=0.2,
        opt_projection_format_epsilon=0.1,
    )
    return built(arguments, _with(config))


def whole(**arguments: Any) -> Trainer:
    """Full fine-tuning: no adapter at all."""
    return built(arguments, lambda base, given: base)


def whole_partly_frozen(**arguments: Any) -> Trainer:
    """Full fine-tuning of the upper layer alone."""

    def wrap(base: Any, given: TrainingArguments) -> Any:
        base.requires_grad_(False)
        base.model.layers[-1].requires_grad_(True)
        return base

    return built(arguments, wrap)
