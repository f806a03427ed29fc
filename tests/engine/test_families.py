"""What an adapter reaches: counted by family, and reported where a target names what it misses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2MoeConfig, Qwen3MoeConfig

from pytest_sftguard.engine.adapter import families
from pytest_sftguard.engine.models import tiny

SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
MLP = ["q_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(config: Any, prepare: Any = lambda model: model, **lora: Any) -> Any:
    """A tiny model of `config` with an adapter."""
    base = AutoModelForCausalLM.from_config(config)
    return prepare(get_peft_model(base, LoraConfig(r=2, task_type="CAUSAL_LM", **lora)))


def moe(**more: Any) -> Any:
    """Two layers, the first dense, the second with experts in one tensor."""
    return Qwen3MoeConfig(
        **SMALL, mlp_only_layers=[0], num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, **more
    )


def shared(layers: int = 2) -> Any:
    """Experts in one tensor, and one that is shared, whose names peft does not translate."""
    return Qwen2MoeConfig(
        **SMALL | {"num_hidden_layers": layers},
        mlp_only_layers=[0],
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
    )


def llama(layers: int = 2) -> Any:
    """A dense model."""
    return LlamaConfig(**SMALL | {"num_hidden_layers": layers})


def missed(model: Any) -> dict[str, int]:
    """How many weights each field names."""
    return {name: names.count for name, names in families.missed(model).items() if names}


def with_a_layer_more(model: Any) -> Any:
    """A copy of the last base layer, appended after the adapter was attached."""
    layers = model.base_model.model.model.layers
    fresh = AutoModelForCausalLM.from_config(llama()).model.layers[0]
    layers.append(copy.deepcopy(fresh))
    return model


@pytest.mark.parametrize(
    ("config", "lora", "prepare", "found"),
    [
        (shared(), {"target_modules": MLP}, None, {"fused": 2}),
        (shared(8), {"target_modules": MLP}, None, {"fused": 14}),
        (shared(), {"target_modules": ["q_proj", "down_proj"]}, None, {"fused": 1}),
        (llama(), {"target_modules": ["q_proj", "v_proj"]}, with_a_layer_more, {"left_out": 2}),
        (llama(12), {"target_modules": r".*layers\.\d\.self_attn\.(q|v)_proj"}, None, {"beyond_one_digit": 4}),
        (llama(12), {"target_modules": r".*layers\.[0-9]\.mlp\.up_proj"}, None, {"beyond_one_digit": 2}),
    ],
    ids=["experts", "experts-of-many-layers", "one-expert-weight", "layer-appended", "one-digit", "one-digit-class"],
)
def test_a_family_that_is_reached_by_half_is_seen(config: Any, lora: Any, prepare: Any, found: Any) -> None:
    """Experts in one tensor, layers that came later, and the layers from number 10 on."""
    assert missed(adapted(config, prepare or (lambda model: model), **lora)) == found


@pytest.mark.parametrize(
    ("config", "lora"),
    [
        (llama(), {"target_modules": "all-linear"}),
        (llama(12), {"target_modules": ["q_proj"], "layers_to_transform": [0, 1, 2]}),
        (llama(12), {"target_modules": ["q_proj"], "layers_to_transform": list(range(10))}),
        (llama(12), {"target_modules": r".*layers\.(0|1|2)\.self_attn\.q_proj"}),
        (llama(12), {"target_modules": r".*layers\.[0-4]\.self_attn\.q_proj"}),
        (llama(12), {"target_modules": r".*layers\.\d+\.self_attn\.q_proj"}),
        (llama(12), {"target_modules": r".*layers\.\d{1,2}\.self_attn\.q_proj"}),
        (llama(12), {"target_modules": ["layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"]}),
        (llama(), {"target_modules": ["q_proj"], "exclude_modules": ["model.layers.1.self_attn.q_proj"]}),
        (llama(), {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"layers.0.self_attn.q_proj": 4}}),
        (llama(), {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
        (moe(), {"target_modules": ["q_proj", "v_proj"]}),
        (moe(), {"target_modules": MLP}),
        (shared(), {"target_modules": "all-linear"}),
        (shared(8), {"target_modules": "all-linear"}),
        (shared(), {"target_modules": ["q_proj", "v_proj"]}),
        (
            shared(),
            {"target_modules": MLP, "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
        ),
        (shared(), {"target_modules": MLP, "exclude_modules": r".*\.experts"}),
        (moe(), {"target_modules": "all-linear"}),
        (
            moe(),
            {"target_modules": MLP, "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
        ),
        (moe(), {"target_modules": MLP, "exclude_modules": r".*layers\.1\.mlp.*"}),
    ],
    ids=lambda value: value.model_type if hasattr(value, "model_type") else "-".join(map(str, value.values()))[:60],
)
def test_what_a_configuration_chooses_is_not_half(config: Any, lora: Any) -> None:
    """Layers, paths, exclusions, patterns and experts that are named elsewhere are meant."""
    assert missed(adapted(config, **lora)) == {}


def test_families_count_what_is_adapted() -> None:
    """Each family has its weights, elements and adapted ones; factors are in none."""
    model = adapted(moe(), target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    counted = {f.name: (f.adapted, f.weights) for f in families.families(model)}
    assert counted["q_proj (Linear)"] == (2, 2)
    assert counted["k_proj (Linear)"] == (0, 2)
    assert counted["down_proj (Qwen3MoeExperts)"] == (1, 1)
    assert counted["gate_up_proj (Qwen3MoeExperts)"] == (0, 1)
    assert counted["down_proj (Linear)"] == (0, 1)
    base = AutoModelForCausalLM.from_config(moe())
    every = sum(p.numel() for p in base.parameters() if p.dim() > 1)
    assert sum(f.elements for f in families.families(model)) == every


def test_a_model_without_an_adapter_misses_nothing() -> None:
    """No family of its is adapted, so that none is counted."""
    model = AutoModelForCausalLM.from_config(tiny.llama(32, 0.1))
    assert families.missed(model) == {}
    assert families.families(model) == ()
