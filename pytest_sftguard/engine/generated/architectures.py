"""Architectures: tiny models of many families, made from their configurations with weights from a fixed seed."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoConfig, set_seed

from pytest_sftguard.engine.generated.axes import CAUSAL, CLASSIFY, IMAGES, MASKED, SEQ2SEQ, SPEECH, TAG
from pytest_sftguard.engine.models.tiny import in_dtype

VOCABULARY, PAD, BOS, EOS, MASK = 64, 0, 1, 2, 3
LABELS = 2
MELS, FRAMES = 8, 32
"""Channels and frames of a piece of speech."""
PIXELS = 16
"""Width and height of an image, which has three channels."""

CLASSES = {
    CAUSAL: "AutoModelForCausalLM",
    CLASSIFY: "AutoModelForSequenceClassification",
    TAG: "AutoModelForTokenClassification",
    MASKED: "AutoModelForMaskedLM",
    SEQ2SEQ: "AutoModelForSeq2SeqLM",
    IMAGES: "AutoModelForImageClassification",
    SPEECH: "AutoModelForSpeechSeq2Seq",
}
"""The class of transformers for each task."""

_IDS = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 160,
}
_COMMON = {**_IDS, **_SIZES, "initializer_range": 0.05}
_GROUPED = {**_COMMON, "num_key_value_heads": 2}
_HEADS = {**_GROUPED, "head_dim": 8}
_STACKS = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "init_std": 0.05,
}

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "qwen2": _GROUPED,
    "qwen3": _HEADS,
    "gemma": _HEADS,
    "gemma2": {**_HEADS, "sliding_window": 8},
    "mistral": {**_GROUPED, "sliding_window": 8},
    "phi": _COMMON,
    "olmo2": _GROUPED,
    "mixtral": {**_GROUPED, "num_local_experts": 4},
    "qwen2_moe": {
        **_GROUPED,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 32,
    },
    "gpt2": {**_IDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 160, "initializer_range": 0.05},
    "gpt_neox": _COMMON,
    "opt": {
        **{k: v for k, v in _COMMON.items() if k not in ("intermediate_size", "initializer_range")},
        "init_std": 0.05,
        "ffn_dim": 64,
        "word_embed_proj_dim": 32,
    },
    "falcon": {**_COMMON, "alibi": True, "new_decoder_architecture": False},
    "mamba": {**_IDS, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "initializer_range": 0.05},
    "bert": _COMMON,
    "roberta": _COMMON,
    "modernbert": {
        **_COMMON,
        "global_attn_every_n_layers": 2,
        "local_attention": 8,
        "cls_token_id": BOS,
        "sep_token_id": EOS,
    },
    "distilbert": {
        "vocab_size": VOCABULARY,
        "pad_token_id": PAD,
        "dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "hidden_dim": 64,
        "max_position_embeddings": 160,
        "initializer_range": 0.05,
    },
    "electra": {**_COMMON, "embedding_size": 32},
    "t5": {
        **_IDS,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
        "decoder_start_token_id": PAD,
    },
    "bart": {
        **_IDS,
        **_STACKS,
        "max_position_embeddings": 64,
        "decoder_start_token_id": EOS,
        "forced_eos_token_id": EOS,
    },
    "vit": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "image_size": PIXELS,
        "patch_size": 8,
        "initializer_range": 0.05,
    },
    "whisper": {
        **_IDS,
        **_STACKS,
        "num_mel_bins": MELS,
        "max_source_positions": FRAMES // 2,
        "max_target_positions": 32,
        "decoder_start_token_id": BOS,
        "begin_suppress_tokens": None,
    },
}
"""What each architecture is configured with."""

_DROPOUTS = (
    "attention_dropout",
    "attention_probs_dropout_prob",
    "attn_pdrop",
    "classifier_dropout",
    "dropout",
    "dropout_rate",
    "embd_pdrop",
    "embedding_dropout",
    "hidden_dropout",
    "hidden_dropout_prob",
    "mlp_dropout",
    "resid_pdrop",
    "seq_classif_dropout",
)
"""Names of dropout rates in the configurations."""


def made(architecture: str, task: str, dtype: torch.dtype, attention: str, dropout: float) -> Any:
    """A tiny model of the architecture for the task, with weights from a fixed seed."""
    config = AutoConfig.for_model(architecture, **CONFIGURATIONS[architecture])
    for name in _DROPOUTS:
        if getattr(config, name, None) is not None:
            setattr(config, name, dropout)
    if task in (CLASSIFY, TAG, IMAGES):
        config.num_labels = LABELS
    set_seed(0)
    chosen = {} if attention == "none" else {"attn_implementation": attention}
    model = getattr(transformers, CLASSES[task]).from_config(config, **chosen)
    # `.to` would round the rotary frequencies
    return in_dtype(model, dtype)
