"""Healthy trainings of many kinds, as users write them: what must come out passed, in every precision.

Each function is a target of its own. Most are the tiny model with one thing done differently.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn
from torch.utils.data import Dataset, IterableDataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    Qwen2Config,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from pytest_sftguard.engine.adapter.adapters import lora_layers
from pytest_sftguard.engine.models import tiny

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BERT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "num_labels": 3,
    "pad_token_id": 0,
}


def built(
    arguments: dict[str, Any],
    *,
    config: Any = None,
    lora: dict[str, Any] | None = None,
    trainer_class: Callable[..., Any] = Trainer,
    auto: Any = AutoModelForCausalLM,
    dataset: Any = None,
    collator: Callable[..., Any] = tiny.collate,
    prepare: Callable[[Any], Any] = lambda base: base,
    wrap: Callable[[Any], Any] = lambda model: model,
    adapter_name: str = "default",
    **more: Any,
) -> Trainer:
    """A Trainer as `tiny.build_trainer` makes it, with any part of it exchanged."""
    arguments = {"learning_rate": 1e-3, "lr_scheduler_type": "constant"} | arguments
    arguments.pop("model")
    dtype = getattr(torch, arguments.pop("dtype"))
    set_seed(0)
    base = prepare(auto.from_config(config or LlamaConfig(**SMALL, tie_word_embeddings=False), dtype=torch.float32))
    base = tiny.in_dtype(base, dtype)
    training_arguments = TrainingArguments(**arguments)
    set_seed(training_arguments.seed)
    given = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | (lora or {})
    model = wrap(get_peft_model(base, LoraConfig(**given), adapter_name))
    rows = tiny.rows(64) if dataset is None else dataset
    return trainer_class(model=model, args=training_arguments, train_dataset=rows, data_collator=collator, **more)


def dora(**arguments: Any) -> Trainer:
    """Weight-decomposed LoRA: a magnitude vector beside the factors."""
    return built(arguments, lora={"use_dora": True})


def rslora(**arguments: Any) -> Trainer:
    """Rank-stabilised scaling."""
    return built(arguments, lora={"use_rslora": True, "r": 16})


def pissa(**arguments: Any) -> Trainer:
    """Factors that start at the base's principal components, which the base loses."""
    return built(arguments, lora={"init_lora_weights": "pissa"})


def olora(**arguments: Any) -> Trainer:
    """Orthonormal factors, taken out of the base."""
    return built(arguments, lora={"init_lora_weights": "olora"})


def gaussian(**arguments: Any) -> Trainer:
    """Another distribution of lora_A."""
    return built(arguments, lora={"init_lora_weights": "gaussian"})


def orthogonal(**arguments: Any) -> Trainer:
    """Both factors start away from zero."""
    return built(arguments, lora={"init_lora_weights": "orthogonal"})


def random_factors(**arguments: Any) -> Trainer:
    """init_lora_weights=False: no factor starts at zero."""
    return built(arguments, lora={"init_lora_weights": False})


def saved_lm_head(**arguments: Any) -> Trainer:
    """The head is trained whole and saved with the adapter."""
    return built(arguments, lora={"modules_to_save": ["lm_head"]})


def saved_embedding_and_head(**arguments: Any) -> Trainer:
    """Embedding and head are trained whole: ids that are in no row have rows without a gradient."""
    return built(arguments, lora={"modules_to_save": ["embed_tokens", "lm_head"]})


def saved_norms(**arguments: Any) -> Trainer:
    """Normalisation layers are trained whole."""
    return built(arguments, lora={"modules_to_save": ["input_layernorm", "post_attention_layernorm"]})


def adapted_lm_head(**arguments: Any) -> Trainer:
    """LoRA on the head."""
    return built(arguments, lora={"target_modules": ["q_proj", "v_proj", "lm_head"]})


def adapted_embedding(**arguments: Any) -> Trainer:
    """LoRA on the embedding: columns of ids that are in no row never move."""
    return built(arguments, lora={"target_modules": ["q_proj", "v_proj", "embed_tokens"]})


def adapted_embedding_of_a_large_vocabulary(**arguments: Any) -> Trainer:
    """Most ids of a vocabulary are in none of the rows."""
    config = LlamaConfig(**SMALL | {"vocab_size": 1024}, tie_word_embeddings=False)
    return built(arguments, config=config, lora={"target_modules": ["q_proj", "v_proj", "embed_tokens"]})


def tied_embeddings(**arguments: Any) -> Trainer:
    """Embedding and head share one tensor."""
    return built(arguments, config=LlamaConfig(**SMALL, tie_word_embeddings=True))


def tied_embeddings_saved(**arguments: Any) -> Trainer:
    """Embedding and head share one tensor, which is trained whole."""
    config = LlamaConfig(**SMALL, tie_word_embeddings=True)
    return built(arguments, config=config, lora={"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True})


def tied_adapted_embedding(**arguments: Any) -> Trainer:
    """LoRA on a tied embedding, which peft saves with its base layer."""
    config = LlamaConfig(**SMALL, tie_word_embeddings=True)
    return built(arguments, config=config, lora={"target_modules": ["q_proj", "v_proj", "embed_tokens"]})


def bias_lora_only(**arguments: Any) -> Trainer:
    """The adapted layers' biases are trained."""
    return built(arguments, config=Qwen2Config(**SMALL), lora={"bias": "lora_only"})


def bias_all(**arguments: Any) -> Trainer:
    """All biases are trained, those of layers without an adapter too."""
    return built(arguments, config=OPTConfig(**OPT), lora={"bias": "all", "target_modules": ["q_proj", "v_proj"]})


def lora_bias(**arguments: Any) -> Trainer:
    """lora_B has a bias of its own."""
    return built(arguments, lora={"lora_bias": True})


def trainable_tokens(**arguments: Any) -> Trainer:
    """Three rows of the embedding are trained beside the factors."""
    return built(arguments, lora={"trainable_token_indices": [3, 4, 5]})


def trainable_tokens_tied(**arguments: Any) -> Trainer:
    """Three rows of a tied embedding are trained."""
    config = LlamaConfig(**SMALL, tie_word_embeddings=True)
    return built(arguments, config=config, lora={"trainable_token_indices": [3, 4, 5]})


def two_adapters(**arguments: Any) -> Trainer:
    """A second adapter is there, and not the active one."""
    return built(arguments, wrap=_with_second_adapter)


def second_adapter_active(**arguments: Any) -> Trainer:
    """The second adapter is the one that trains."""

    def wrap(model: Any) -> Any:
        _with_second_adapter(model).set_adapter("second")
        return model

    return built(arguments, wrap=wrap)


def named_adapter(**arguments: Any) -> Trainer:
    """The one adapter is not called default."""
    return built(arguments, adapter_name="units")


def rank_one(**arguments: Any) -> Trainer:
    """The smallest rank."""
    return built(arguments, lora={"r": 1})


def rank_64(**arguments: Any) -> Trainer:
    """A rank above the layers' width."""
    return built(arguments, lora={"r": 64})


def twice_the_rank(**arguments: Any) -> Trainer:
    """The plain adapter, for arguments of many kinds."""
    return built(arguments, lora={"r": 8, "lora_alpha": 16})


def rank_pattern(**arguments: Any) -> Trainer:
    """Ranks and alphas that differ by layer."""
    return built(arguments, lora={"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 32}})


def small_alpha(**arguments: Any) -> Trainer:
    """An alpha far below the rank."""
    return built(arguments, lora={"r": 16, "lora_alpha": 1})


def large_alpha(**arguments: Any) -> Trainer:
    """An alpha far above the rank."""
    return built(arguments, lora={"r": 4, "lora_alpha": 128})


def last_layer_alone(**arguments: Any) -> Trainer:
    """layers_to_transform: the lower layer stays as it is."""
    return built(arguments, lora={"layers_to_transform": [1], "target_modules": ["q_proj", "v_proj"]})


def dropout(**arguments: Any) -> Trainer:
    """Dropout before the factors and in the attention."""
    config = LlamaConfig(**SMALL, attention_dropout=0.1, tie_word_embeddings=False)
    return built(arguments, config=config, lora={"lora_dropout": 0.1})


def heavy_dropout(**arguments: Any) -> Trainer:
    """Half of the adapters' inputs are dropped."""
    return built(arguments, lora={"lora_dropout": 0.5})


def rank_one_dropout_one_row(**arguments: Any) -> Trainer:
    """Micro-batches of one row, rank 1 and dropout: as little signal as a step can have."""
    return built(arguments, lora={"r": 1, "lora_dropout": 0.5})


def lora_plus(**arguments: Any) -> Trainer:
    """LoRA+: lora_B learns sixteen times faster."""
    from peft.optimizers import create_loraplus_optimizer

    trainer = built(arguments)
    trainer.optimizer = create_loraplus_optimizer(
        trainer.model, torch.optim.AdamW, lr=trainer.args.learning_rate, loraplus_lr_ratio=16
    )
    return trainer


def parameter_groups(**arguments: Any) -> Trainer:
    """Own groups with own learning rates, the first of them with the smallest."""
    trainer = built(arguments)
    a = [p for n, p in trainer.model.named_parameters() if p.requires_grad and "lora_A" in n]
    b = [p for n, p in trainer.model.named_parameters() if p.requires_grad and "lora_B" in n]
    trainer.optimizer = torch.optim.AdamW([{"params": a, "lr": 1e-5}, {"params": b, "lr": 1e-3, "weight_decay": 0.1}])
    return trainer


OPT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "ffn_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "word_embed_proj_dim": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def gpt2(**arguments: Any) -> Trainer:
    """Conv1D layers, dropout, tied embeddings."""
    config = GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    return built(
        arguments, config=config, lora={"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}
    )


def qwen2(**arguments: Any) -> Trainer:
    """Qwen2, with biases in its attention."""
    return built(arguments, config=Qwen2Config(**SMALL))


def gemma2(**arguments: Any) -> Trainer:
    """Gemma 2: soft caps, sliding windows, tied embeddings."""
    return built(arguments, config=Gemma2Config(**SMALL, head_dim=8, query_pre_attn_scalar=8))


def opt(**arguments: Any) -> Trainer:
    """OPT: learned positions, dropout 0.1, tied embeddings."""
    return built(arguments, config=OPTConfig(**OPT))


def opt_layerdrop(**arguments: Any) -> Trainer:
    """OPT with layerdrop: a whole layer is left out of some steps, and has no gradient there."""
    return built(arguments, config=OPTConfig(**OPT | {"num_hidden_layers": 4}, layerdrop=0.2))


def mixtral(**arguments: Any) -> Trainer:
    """A mixture of experts, LoRA on everything that peft calls linear: router and experts too."""
    return built(arguments, config=MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2))


def mixtral_experts(**arguments: Any) -> Trainer:
    """A mixture of many experts with LoRA on the experts' own parameters."""
    config = MixtralConfig(**SMALL, num_local_experts=32, num_experts_per_tok=2)
    lora = {
        "target_modules": ["q_proj", "v_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    }
    return built(arguments, config=config, lora=lora)


class _Experts(nn.Module):
    """Experts as modules of their own: one token of each row goes to one of them."""

    def __init__(self, width: int, count: int = 8) -> None:
        super().__init__()
        self.router = nn.Linear(width, count, bias=False)
        self.experts = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(count))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        chosen = self.router(flat).softmax(-1)
        weight, index = chosen.max(-1)
        out = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            rows = (index == i).nonzero()[:, 0]
            if len(rows):
                out = out.index_add(0, rows, (expert(flat[rows]) * weight[rows, None]).to(out.dtype))
        return out.reshape(hidden.shape)


def idle_experts(**arguments: Any) -> Trainer:
    """Experts that see no token of a step have no gradient there, and some see none in the whole run."""

    def prepare(base: Any) -> Any:
        for layer in base.model.layers:
            layer.mlp = _Experts(32)
        return base

    return built(arguments, prepare=prepare, lora={"target_modules": r".*(q_proj|v_proj|experts\.\d+)"})


def checkpointing(**arguments: Any) -> Trainer:
    """Gradient checkpointing, not re-entrant."""
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    return built(options | arguments)


def checkpointing_reentrant(**arguments: Any) -> Trainer:
    """Gradient checkpointing, re-entrant."""
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    return built(options | arguments)


def eager_alibi(**arguments: Any) -> Trainer:
    """Falcon with ALiBi and eager attention, which it chooses when it is built."""
    shape = {k: v for k, v in SMALL.items() if k not in ("num_key_value_heads", "head_dim")}
    return built(arguments, config=FalconConfig(**shape, alibi=True, attn_implementation="eager"))


def sdpa(**arguments: Any) -> Trainer:
    """Attention by sdpa."""
    return _with_attention(arguments, "sdpa")


def eager(**arguments: Any) -> Trainer:
    """Attention written out."""
    return _with_attention(arguments, "eager")


def one_row(**arguments: Any) -> Trainer:
    """A data set of a single row."""
    return built(arguments, dataset=tiny.rows(64)[:1])


def three_rows(**arguments: Any) -> Trainer:
    """A data set smaller than a micro-batch."""
    return built(arguments, dataset=tiny.rows(64)[:3])


def eleven_rows(**arguments: Any) -> Trainer:
    """A data set that neither batch nor accumulation divides: each epoch ends in a short step."""
    return built(arguments, dataset=tiny.rows(64)[:11])


def streamed(**arguments: Any) -> Trainer:
    """An IterableDataset, without a length."""
    return built(arguments, dataset=_Stream())


def torch_dataset(**arguments: Any) -> Trainer:
    """A map-style torch Dataset of tensors."""
    return built(arguments, dataset=_Mapped(), collator=_collate_tensors)


def extra_columns(**arguments: Any) -> Trainer:
    """Rows with columns that the model does not take, which the collator leaves out."""
    return built(arguments, dataset=[row | {"text": "1 km = 1000 m", "id": i} for i, row in enumerate(tiny.rows(64))])


def stray_keys_kept(**arguments: Any) -> Trainer:
    """The collator keeps the row's text for logging; the Trainer subclass takes it out."""

    class Own(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            inputs.pop("texts")
            return super().compute_loss(model, inputs, *args, **kwargs)

    def collate(features: Any) -> Any:
        return tiny.collate(features) | {"texts": ["x"] * len(features)}

    return built(arguments | {"remove_unused_columns": False}, trainer_class=Own, collator=collate)


def left_padded(**arguments: Any) -> Trainer:
    """Padding before the row."""
    return built(arguments, collator=collate_left)


def padded_to_eight(**arguments: Any) -> Trainer:
    """Padding to a multiple, twice as long as the longest row."""
    rows = [_padded(row, 48) for row in tiny.rows(64)]
    return built(arguments, dataset=rows, collator=_collate_padded)


def packed(**arguments: Any) -> Trainer:
    """Two rows in one, told apart by positions that start again, without an attention mask."""
    return built(arguments, collator=_collate_packed)


def mask_of_four_dimensions(**arguments: Any) -> Trainer:
    """The collator makes the causal mask itself, with the lowest finite number."""
    return built(arguments, collator=_collate_masked)


def llama_chat(**arguments: Any) -> Trainer:
    """Rows of two turns, with an end token inside, and attention across the turns."""
    rows = [_joined(a, b) for a, b in zip(tiny.rows(64)[::2], tiny.rows(64)[1::2], strict=True)]
    return built(arguments, dataset=rows)


def long_prompts(**arguments: Any) -> Trainer:
    """Prompts that fill the context, with one supervised token."""
    rows = [
        {"input_ids": [1, *(3 + (i * k) % 61 for k in range(100)), 2], "labels": [-100] * 101 + [2]} for i in range(24)
    ]
    return built(arguments, dataset=rows)


def one_micro_batch_without_labels(**arguments: Any) -> Trainer:
    """A row truncated before its answer: normalised over the step, its micro-batch's loss is 0 and harmless."""
    rows = tiny.rows(64)
    rows[5]["labels"] = [-100] * len(rows[5]["labels"])
    return built(arguments, dataset=rows)


def own_loss(**arguments: Any) -> Trainer:
    """A compute_loss overridden as before num_items_in_batch."""

    class Own(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            logits = outputs.logits[:, :-1].float()
            loss = nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1))
            return (loss, outputs) if return_outputs else loss

    return built(arguments, trainer_class=Own)


def own_loss_normalised(**arguments: Any) -> Trainer:
    """A compute_loss overridden, with num_items_in_batch passed on, and an auxiliary term."""

    class Own(Trainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            loss = loss + 1e-4 * outputs.logits.float().logsumexp(-1).pow(2).mean()
            return (loss, outputs) if return_outputs else loss

    return built(arguments, trainer_class=Own)


def own_training_step(**arguments: Any) -> Trainer:
    """A training_step overridden, calling super, with a log line of its own."""

    class Own(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            self.seen = getattr(self, "seen", 0) + 1
            return loss

    return built(arguments, trainer_class=Own)


def own_log(**arguments: Any) -> Trainer:
    """Trainer.log overridden to add a perplexity, and a callback that logs in between."""

    class Own(Trainer):
        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            if "loss" in logs:
                logs["perplexity"] = math.exp(min(float(logs["loss"]), 50))
            super().log(logs, *args, **kwargs)

    class Logs(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            state.log_history.append({"step": state.global_step, "memory": 1.0})

    return built(arguments, trainer_class=Own, callbacks=[Logs()])


def lion(**arguments: Any) -> Trainer:
    """An optimizer of one's own that steps by the sign."""
    trainer = built(arguments)
    trainer.optimizer = _Lion([p for p in trainer.model.parameters() if p.requires_grad], lr=1e-4)
    return trainer


def own_scheduler(**arguments: Any) -> Trainer:
    """optimizers=(AdamW, LambdaLR), as older scripts pass them."""
    trainer = built(arguments)
    trainer.optimizer = torch.optim.AdamW([p for p in trainer.model.parameters() if p.requires_grad], lr=1e-3)
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, lambda step: 0.9**step)
    return trainer


def all_parameters_to_the_optimizer(**arguments: Any) -> Trainer:
    """An optimizer that is handed the frozen parameters too; they have no gradient, and stay."""
    trainer = built(arguments)
    trainer.optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=1e-3)
    return trainer


def evaluated(**arguments: Any) -> Trainer:
    """An evaluation after every other step."""
    defaults = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4}
    return built(defaults | arguments, eval_dataset=tiny.rows(64)[:8])


def evaluated_early_stopping(**arguments: Any) -> Trainer:
    """Evaluations, checkpoints, and the best of them loaded at the end."""
    defaults = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
    }
    return built(defaults | arguments | {"save_strategy": "steps"}, eval_dataset=tiny.rows(64)[:8])


def scale_grows(**arguments: Any) -> Trainer:
    """Mixed float16 whose scale doubles every tenth step, and overflows now and then: healthy."""
    from pytest_sftguard.engine.building.cpu_float16 import make_real

    trainer = built({"max_grad_norm": 1.0} | arguments)
    make_real(trainer)
    if trainer.accelerator.scaler is not None:
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14, growth_interval=12)
    return trainer


def bert_classifier(**arguments: Any) -> Trainer:
    """A classifier: labels of one dimension, a head that is trained whole."""
    rows = [{"input_ids": r["input_ids"], "label": sum(r["input_ids"]) % 3} for r in tiny.rows(64)]
    lora = {"task_type": TaskType.SEQ_CLS, "target_modules": ["query", "value"]}
    return built(
        arguments,
        config=BertConfig(**BERT),
        auto=AutoModelForSequenceClassification,
        lora=lora,
        dataset=rows,
        collator=_collate_classes,
    )


def regression(**arguments: Any) -> Trainer:
    """A regressor: labels are numbers."""
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        num_labels=1,
        problem_type="regression",
        pad_token_id=0,
    )
    rows = [{"input_ids": r["input_ids"], "label": float(sum(r["input_ids"]) % 7) / 7} for r in tiny.rows(64)]
    lora = {"task_type": TaskType.SEQ_CLS, "target_modules": ["query", "value"]}
    return built(
        arguments,
        config=config,
        auto=AutoModelForSequenceClassification,
        lora=lora,
        dataset=rows,
        collator=_collate_classes,
    )


def prepared_for_kbit(**arguments: Any) -> Trainer:
    """Norms and head in float32 and inputs that require gradients, as prepare_model_for_kbit_training leaves them."""

    def prepare(base: Any) -> Any:
        base.requires_grad_(False)
        base.enable_input_require_grads()
        return base

    return built(arguments, prepare=prepare)


def registered_counter(**arguments: Any) -> Trainer:
    """A base that counts its forward passes in a buffer which is no part of its state."""

    def prepare(base: Any) -> Any:
        base.register_buffer("passes", torch.zeros((), dtype=torch.int64), persistent=False)

        def count(module: Any, inputs: Any, output: Any) -> None:
            base.passes += 1

        base.register_forward_hook(count)
        return base

    return built(arguments, prepare=prepare)


def dynamic_rope(**arguments: Any) -> Trainer:
    """Rotary frequencies that are computed anew where a batch is longer than the context."""
    config = LlamaConfig(
        **SMALL | {"max_position_embeddings": 16},
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    )
    return built(arguments, config=config)


def continued(**arguments: Any) -> Trainer:
    """An adapter that was trained before, so that no factor starts at zero."""

    def wrap(model: Any) -> Any:
        generator = torch.Generator().manual_seed(5)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.data.add_(0.02 * torch.randn(p.shape, generator=generator))
        return model

    return built(arguments, wrap=wrap)


def _with_second_adapter(model: Any) -> Any:
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    return model


def _with_attention(arguments: dict[str, Any], name: str) -> Trainer:
    def prepare(base: Any) -> Any:
        base.set_attn_implementation(name)
        return base

    return built(arguments, prepare=prepare)


class _Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        yield from tiny.rows(64)


class _Mapped(Dataset):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Any:
        return {k: torch.tensor(v) for k, v in tiny.rows(64)[index].items()}


def _collate_tensors(features: Any) -> Any:
    return tiny.collate([{k: v.tolist() for k, v in f.items()} for f in features])


def collate_left(features: Any) -> Any:
    batch = tiny.collate(features)
    for i, f in enumerate(features):
        shift = batch["input_ids"].shape[1] - len(f["input_ids"])
        for key in batch:
            batch[key][i] = batch[key][i].roll(shift)
    return batch


def _joined(row: Any, other: Any) -> Any:
    return {
        # one BOS, at the beginning
        "input_ids": row["input_ids"] + other["input_ids"][1:],
        "labels": row["labels"] + other["labels"][1:],
    }


def _collate_packed(features: Any) -> Any:
    count = max(1, len(features) // 2)
    packs = [features[i::count] for i in range(count)]
    width = min(sum(len(f["input_ids"]) for f in pack) for pack in packs)
    return {
        "input_ids": torch.tensor([[t for f in pack for t in f["input_ids"]][:width] for pack in packs]),
        "labels": torch.tensor([[t for f in pack for t in f["labels"]][:width] for pack in packs]),
        "position_ids": torch.tensor([[t for f in p for t in range(len(f["input_ids"]))][:width] for p in packs]),
    }


def _collate_masked(features: Any) -> Any:
    batch = tiny.collate(features)
    width = batch["input_ids"].shape[1]
    seen = torch.ones(width, width, dtype=torch.bool).tril() & batch["attention_mask"].bool()[:, None, None, :]
    batch["attention_mask"] = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    return batch


def _collate_classes(features: Any) -> Any:
    rows = [{"input_ids": f["input_ids"], "labels": f["input_ids"]} for f in features]
    labels = torch.tensor([f["label"] for f in features])
    return tiny.collate(rows) | {"labels": labels}


def _padded(row: Any, length: int) -> Any:
    missing = length - len(row["input_ids"])
    return {
        "input_ids": row["input_ids"] + [0] * missing,
        "labels": row["labels"] + [-100] * missing,
        "attention_mask": [1] * len(row["input_ids"]) + [0] * missing,
    }


def _collate_padded(features: Any) -> Any:
    return {key: torch.tensor([f[key] for f in features]) for key in features[0]}


class _Lion(torch.optim.Optimizer):
    """Steps by the sign of an interpolated momentum."""

    def __init__(self, parameters: Any, lr: float = 1e-4) -> None:
        super().__init__(parameters, {"lr": lr, "betas": (0.9, 0.99)})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                p.sub_(group["lr"] * torch.sign(torch.lerp(p.grad, momentum, 0.9)))
                momentum.lerp_(p.grad, 0.01)


def own_kernel(**arguments: Any) -> Trainer:
    """The training has kernels of its own for LoRA's sums, as fused ones are patched in: right, in another order."""
    return with_kernel(built(arguments), lambda layer, a, b, x: x @ (a.T @ b.T))


def with_kernel(trainer: Trainer, share: Callable[[Any, Any, Any, Any], Any]) -> Trainer:
    """Let each LoRA layer add `share(layer, a, b, x)`, scaled, by a forward of its own."""
    for layer in lora_layers(trainer.model).values():

        def forward(x: Any, layer: Any = layer) -> Any:
            result = layer.base_layer(x)
            if layer.disable_adapters:
                return result
            a, b = (factors["default"].weight.to(x.dtype) for factors in (layer.lora_A, layer.lora_B))
            return result + (layer.scaling["default"] * share(layer, a, b, x)).to(result.dtype)

        layer.forward = forward
    return trainer
